"""Task-specific geometric sensitive hashing: how alike points of a task are, whatever their class.

A *cell* is the points of one class in one task. Intra pairs are of one task and two classes, inter
pairs of one class and two tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuromod_ext import _checks as op_checks
from neuromod_ext.analysis import _checks


class Score(NamedTuple):
    """The T-GSH score and its test; see :meth:`PairSimilarity.score`.

    Attributes:
        score: ``intra - inter``, above 0 where the property holds.
        intra: Mean cosine similarity of all intra pairs.
        inter: Mean cosine similarity of all inter pairs.
        half_width: Of the score's 95 % interval over tasks.
        p_value: One-sided, of the hypothesis that the score is at most 0.
    """

    score: float
    intra: float
    inter: float
    half_width: float
    p_value: float


class PairSimilarity:
    r"""Mean cosine similarities over all pairs of points, from one pass over the points.

    .. math:: \sum_{i \in a} \sum_{j \in b} \cos(z_i, z_j) = \langle m_a, m_b \rangle, \qquad
              m_a = \sum_{i \in a} z_i / \|z_i\|

    So the sums m_a of the cells' unit vectors, [tasks, classes, D] in float64, are all that is
    kept: no pair is ever formed, and no point is stored. A point that is zero has no direction and
    is left out; ``left_out`` counts them.

    Args:
        tasks: T.
        classes: C.

    Raises:
        ValueError: One of them is below 2.
    """

    def __init__(self, tasks: int, classes: int) -> None:
        for name, value in (("tasks", tasks), ("classes", classes)):
            if value < 2:
                raise ValueError(f"PairSimilarity: expected {name} of at least 2, got {value}")
        self.tasks = tasks
        self.classes = classes
        self.left_out = 0
        self._sums: Tensor | None = None
        # Of each cell, how many points it has, and the sum of its points' similarity to themselves.
        self._counts = torch.zeros(tasks, classes, dtype=torch.float64)
        self._selves = torch.zeros(tasks, classes, dtype=torch.float64)

    @torch.no_grad()
    def update(self, points: Tensor, task: int, label: Tensor) -> None:
        """Take in points of one task.

        Args:
            points: The representations z, [N, D].
            task: Which task, 0 to T - 1.
            label: Their classes, [N], int64, 0 to C - 1.

        Raises:
            TypeError: ``points`` is no floating tensor, or ``label`` is not int64.
            ValueError: Shapes that do not fit, a point that is not finite, or a task or a class out
                of its range.
        """
        op = "PairSimilarity.update"
        points = _checks.matrix(op, "points", points, "[N, D]")
        _labels(op, label, len(points), self.classes)
        if not 0 <= task < self.tasks:
            raise ValueError(f"{op}: expected task from 0 to {self.tasks - 1}, got {task}")
        width = points.shape[1]
        if self._sums is None:
            self._sums = points.new_zeros(self.tasks, self.classes, width)
        if self._sums.shape[2] != width:
            raise ValueError(
                f"{op}: expected points of shape [N, D] = [N, {self._sums.shape[2]}], as before, "
                f"got {op_checks._shape(points.shape)}"
            )
        directed = points.any(1)
        self.left_out += int((~directed).sum())
        units = _checks.units(op, "points", points[directed])
        label = label.to(units.device)[directed]
        self._sums[task].index_add_(0, label, units)
        self._counts[task] += label.bincount(minlength=self.classes).cpu()
        selves = units.square().sum(1)
        self._selves[task].index_add_(0, label.cpu(), selves.cpu())

    def cells(self) -> Tensor:
        """Mean similarity of the points of every two cells.

        Returns:
            [T, C, T, C], float64; within a cell of a point and another; NaN where there is no pair.
        """
        sums, pairs = self._pairs()
        shape = (self.tasks, self.classes) * 2
        return (sums / pairs.where(pairs > 0, torch.nan)).view(shape)

    def intra(self) -> Tensor:
        """Mean similarity of all intra pairs of each task, [T], float64; NaN without a pair."""
        sums, pairs = self._intra()
        return sums / pairs.where(pairs > 0, torch.nan)

    def inter(self) -> Tensor:
        """Mean similarity of all inter pairs of every two tasks, [T, T]; NaN without a pair."""
        sums, pairs = self._inter()
        return sums / pairs.where(pairs > 0, torch.nan)

    def score(self) -> Score:
        r"""By how much a task ties points together more than a class does.

        .. math:: s = \overline{\cos}_{\text{intra}} - \overline{\cos}_{\text{inter}}

        Each mean is over all pairs. The pairs are far from independent: all pairs of a task share
        its context, so a test over pairs, or over points, would take a few contexts for millions
        of observations. Here the task is the unit. Inter similarity is a mean over pairs of tasks
        (a U-statistic), so its error comes from the jackknife: s is computed again without each
        task, and the pseudo-values T s - (T - 1) s_{-t} go into a one-sided t-test with T - 1
        degrees of freedom. It answers for other tasks of the same kind; the classes and the fixed
        random weights are taken as given.

        Returns:
            The score, both means, the score's 95 % interval and the p-value.

        Raises:
            ImportError: There is no scipy.
            ValueError: There are less than 3 tasks, or no intra or inter pairs without one of them.

        Source: the property, Hong and Pavlic, "Randomly Weighted Neuromodulation in Neural Networks
        Facilitates Learning of Manifolds Common Across Tasks", definition 1 and figure 2a; the
        jackknife, Arvesen, "Jackknifing U-statistics", Annals of Mathematical Statistics 40 (1969).
        The score and its test are our choice.
        """
        op = "PairSimilarity.score"
        tasks = self.tasks
        if tasks < 3:
            raise ValueError(f"{op}: expected at least 3 tasks, got {tasks}")
        intra, intra_pairs = self._intra()
        inter, inter_pairs = self._inter()
        everything = torch.ones(tasks, dtype=torch.bool)
        kept = torch.cat((everything.unsqueeze(0), ~torch.eye(tasks, dtype=torch.bool))).double()

        def means(sums: Tensor, pairs: Tensor) -> Tensor:
            """Of all tasks, and then without each: [1 + T]."""
            if sums.dim() == 1:
                return (kept @ sums) / (kept @ pairs)
            return ((kept @ sums) * kept).sum(1) / ((kept @ pairs) * kept).sum(1)

        of_task, of_class = means(intra, intra_pairs), means(inter, inter_pairs)
        scores = of_task - of_class
        if not scores.isfinite().all():
            raise ValueError(
                f"{op}: expected points of two classes in a task and of one class in two tasks, "
                "whichever task is left out, got too few; update with points of every task"
            )
        pseudo = tasks * scores[0] - (tasks - 1) * scores[1:]
        error = max(float(pseudo.std()) / math.sqrt(tasks), torch.finfo(torch.float64).tiny)
        student = _checks.scipy(op, "stats").t(tasks - 1)
        return Score(
            float(scores[0]),
            float(of_task[0]),
            float(of_class[0]),
            half_width=float(student.ppf(0.975)) * error,
            p_value=float(student.sf(float(pseudo.mean()) / error)),
        )

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Sums of similarities, and numbers of pairs, of every two cells: [T C, T C]."""
        if self._sums is None:
            raise ValueError("PairSimilarity: expected points, got none yet; call update first")
        rows = self._sums.flatten(0, 1)
        counts = self._counts.flatten()
        sums = (rows @ rows.mT).cpu() - self._selves.flatten().diag()
        return sums, counts.outer(counts) - counts.diag()

    def _intra(self) -> tuple[Tensor, Tensor]:
        """Sums and pairs of two classes in each task: [T]."""
        apart = ~torch.eye(self.classes, dtype=torch.bool)
        shape = (self.tasks, self.classes) * 2
        sums, pairs = (x.view(shape).diagonal(dim1=0, dim2=2)[apart].sum(0) for x in self._pairs())
        return sums, pairs

    def _inter(self) -> tuple[Tensor, Tensor]:
        """Sums and pairs of one class in two tasks: [T, T], nothing on the diagonal."""
        shape = (self.tasks, self.classes) * 2
        sums, pairs = (x.view(shape).diagonal(dim1=1, dim2=3).sum(-1) for x in self._pairs())
        return sums.fill_diagonal_(0), pairs.fill_diagonal_(0)


class SimilarityHistogram(NamedTuple):
    """How the similarities of all pairs are spread; see :func:`similarity_histogram`.

    Attributes:
        edges: Of the bins, [bins + 1], from -1 to 1.
        intra: Number of intra pairs in each bin, [bins], int64.
        inter: Number of inter pairs in each bin, [bins], int64.
    """

    edges: Tensor
    intra: Tensor
    inter: Tensor

    def separation(self) -> float:
        """Probability that an intra pair is more similar than an inter pair (ties: a half)."""
        intra, inter = (n.double() / n.sum() for n in (self.intra, self.inter))
        return float((intra * (inter.cumsum(0) - inter / 2)).sum())


@torch.no_grad()
def similarity_histogram(
    cell: Callable[[int, int], Tensor],
    tasks: Sequence[int],
    classes: Sequence[int],
    *,
    bins: int = 100,
    cells_at_once: int = 8,
) -> SimilarityHistogram:
    """Count the cosine similarities of all intra and all inter pairs.

    Products of blocks of unit vectors, of at most ``cells_at_once`` cells each, are counted at
    once: two blocks and their product are all that is in memory. The points of a cell are asked
    for again whenever they are needed, which costs little beside their products. A point that is
    zero has no direction and is left out.

    Args:
        cell: Called with a task and a class; returns their points, [N, D].
        tasks: The tasks.
        classes: The classes.
        bins: How many bins from -1 to 1.
        cells_at_once: Cells in a block.

    Returns:
        The counts.

    Raises:
        TypeError: ``cell`` returns no floating tensor.
        ValueError: It returns another shape or what is not finite, there are less than two tasks or
            classes, or a number is below 1.
    """
    op = "similarity_histogram"
    for name, value, least in (
        ("tasks", len(tasks), 2),
        ("classes", len(classes), 2),
        ("bins", bins, 1),
        ("cells_at_once", cells_at_once, 1),
    ):
        if value < least:
            raise ValueError(f"{op}: expected {name} of at least {least}, got {value}")

    def block(keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Unit vectors, [N, D], and the place of each one's cell in keys, [N]."""
        cells = [cell(*key) for key in keys]
        for points in cells:
            op_checks.tensors(op, cell=points)
            op_checks._floating(op, "cell", points)
            op_checks._rank(op, "cell", points, 2, "[N, D]")
        directed = [points[points.any(1)] for points in cells]
        sizes = torch.tensor([len(points) for points in directed])
        points = torch.cat(directed)
        wide = torch.promote_types(points.dtype, torch.float32)
        units = _checks.units(op, "points", points).to(wide)
        return units, torch.arange(len(keys)).repeat_interleave(sizes)

    def counted(keys: list[tuple[int, int]]) -> Tensor:
        """Pairs of different cells among these."""
        counts = torch.zeros(bins, dtype=torch.int64)
        starts = range(0, len(keys), cells_at_once)
        for i in starts:
            left, left_cell = block(keys[i : i + cells_at_once])
            for j in starts[i // cells_at_once :]:
                same = i == j
                right, right_cell = (
                    (left, left_cell) if same else block(keys[j : j + cells_at_once])
                )
                cosine = (left @ right.mT).clamp(-1, 1).float().cpu()
                if same:
                    cosine = cosine[left_cell.unsqueeze(1) < right_cell]
                for part in cosine.flatten().split(2**24):  # as far as float32, histc's, can count
                    counts += torch.histc(part, bins, -1, 1).long()
        return counts

    intra, inter = torch.zeros(2, bins, dtype=torch.int64)
    for task in tasks:
        intra += counted([(task, label) for label in classes])
    for label in classes:
        inter += counted([(task, label) for task in tasks])
    return SimilarityHistogram(torch.linspace(-1, 1, bins + 1, dtype=torch.float64), intra, inter)


def _labels(op: str, label: Tensor, count: int, classes: int) -> None:
    op_checks.tensors(op, label=label)
    if label.dtype != torch.int64:
        raise TypeError(
            f"{op}: expected label of dtype int64, got {op_checks._name(label.dtype)}; "
            "convert it with .long()"
        )
    op_checks._same_shape(op, "label", label, "[N]", [count])
    low, high = (int(x) for x in label.aminmax()) if count else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"{op}: expected label from 0 to C - 1 = {classes - 1}, got {low} to {high}"
        )
