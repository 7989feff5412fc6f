"""What the contexts that tasks have learned tell about the tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext.analysis import _checks


def context_similarity(gains: Tensor) -> Tensor:
    r"""Cosine similarity of the contexts of all pairs of tasks.

    .. math:: C_{tu} = \frac{\langle \alpha_t v_t, \alpha_u v_u \rangle}
                            {\|\alpha_t v_t\| \, \|\alpha_u v_u\|}

    Of a strength α only its sign counts. Call it before and after training: contexts are drawn
    independently, so what structure there is afterwards was learned.

    Args:
        gains: The contexts α_t v_t, one a task, [T, D].

    Returns:
        [T, T], float64, with ones on the diagonal; NaN for a task whose context is zero.

    Raises:
        TypeError: ``gains`` is no floating tensor.
        ValueError: It has another shape.

    Source: Hong and Pavlic, "Randomly Weighted Neuromodulation in Neural Networks Facilitates
    Learning of Manifolds Common Across Tasks", section 3.2.
    """
    rows = _checks.matrix("context_similarity", "gains", gains, "[T, D]")
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosine: Tensor = rows @ rows.mT
    return cosine.clamp(-1, 1)


def neighbour_share(similarity: Tensor, *, closed: bool = True) -> float:
    """Share of the tasks whose most similar other task stands next to them in the order.

    By chance it is 2 / (T - 1) in a closed order.

    Args:
        similarity: Of all pairs of tasks in their order, [T, T].
        closed: The last task stands next to the first, as rotations do.

    Returns:
        From 0 to 1.

    Raises:
        TypeError: ``similarity`` is no floating tensor.
        ValueError: It is not square, symmetric and finite, or has less than two tasks.
    """
    of_others = _checks.similarity("neighbour_share", "similarity", similarity).clone()
    of_others.fill_diagonal_(-torch.inf)
    tasks = len(of_others)
    apart = (of_others.argmax(1) - torch.arange(tasks, device=of_others.device)).abs()
    next_to = apart == 1
    if closed:
        next_to |= apart == tasks - 1
    return float(next_to.double().mean())


class MantelTest(NamedTuple):
    """The outcome of :func:`mantel_test`."""

    correlation: float
    p_value: float


def mantel_test(
    first: Tensor, second: Tensor, *, permutations: int = 9999, seed: int = 0
) -> MantelTest:
    r"""Whether two similarity matrices of the same tasks agree: Mantel's permutation test.

    The statistic is Pearson's correlation of the entries above the diagonals. Entries of one row
    share a task and are not independent, so tasks are permuted, rows and columns together, and not
    entries; p is the share of permutations that correlate at least as much, the given order
    counted as one.

    Args:
        first: [T, T].
        second: [T, T].
        permutations: How many are drawn.
        seed: Of the permutations.

    Returns:
        The correlation and its one-sided p-value.

    Raises:
        TypeError: No floating tensors.
        ValueError: The matrices are not square, symmetric and finite, differ in shape, have less
            than three tasks, or ``permutations`` is below 1.

    Source: Mantel, "The detection of disease clustering and a generalized regression approach",
    Cancer Research 27 (1967).
    """
    op = "mantel_test"
    first = _checks.similarity(op, "first", first).cpu()
    second = _checks.similarity(op, "second", second).cpu()
    tasks = len(first)
    if first.shape != second.shape or tasks < 3:
        raise ValueError(
            f"{op}: expected two matrices of the same three or more tasks, "
            f"got {tasks} and {len(second)}"
        )
    if permutations < 1:
        raise ValueError(f"{op}: expected permutations of at least 1, got {permutations}")
    rows, columns = torch.triu_indices(tasks, tasks, 1)
    fixed = _standardised(second[rows, columns])
    generator = torch.Generator().manual_seed(seed)
    found = float(_standardised(first[rows, columns]) @ fixed)
    at_least = 1
    for _ in range(permutations):
        order = torch.randperm(tasks, generator=generator)
        drawn = _standardised(first[order[rows], order[columns]]) @ fixed
        at_least += int(drawn >= found - 1e-12)  # a permutation that changes nothing is no less
    return MantelTest(found, at_least / (permutations + 1))


def _standardised(values: Tensor) -> Tensor:
    return F.normalize(values - values.mean(), dim=0)
