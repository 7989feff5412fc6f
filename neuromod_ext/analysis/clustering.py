"""Agglomerative clustering of tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuromod_ext.analysis import _checks

METHODS = ("average", "complete", "single", "weighted")


@dataclass(frozen=True)
class Clustering:
    """A tree of tasks.

    Attributes:
        linkage: [T - 1, 4] in scipy's form: the two clusters joined, their distance, and how many
            tasks the new cluster has.
        order: The tasks, from one end of the tree's foot to the other, similar ones side by side.
    """

    linkage: NDArray[np.float64]
    order: list[int]

    def groups(self, count: int) -> list[list[int]]:
        """Cut the tree.

        Args:
            count: Number of groups, 1 to T.

        Returns:
            The tasks of each group, ascending, groups by their first task.

        Raises:
            ValueError: ``count`` is out of its range.
        """
        tasks = len(self.order)
        if not 1 <= count <= tasks:
            raise ValueError(f"Clustering.groups: expected count from 1 to {tasks}, got {count}")
        members = {task: [task] for task in range(tasks)}
        for i, (left, right) in enumerate(self.linkage[: tasks - count, :2].astype(int)):
            members[tasks + i] = sorted(members.pop(int(left)) + members.pop(int(right)))
        return sorted(members.values())


def cluster_tasks(similarity: Tensor, *, method: str = "average") -> Clustering:
    """Join the most similar tasks, then clusters of them, until one is left.

    The distance of two tasks is one less their similarity, that of clusters the mean distance of
    their members (``method="average"``: the paper names none, this is our choice).

    Args:
        similarity: Of all pairs of tasks, [T, T], as :func:`context_similarity` gives it.
        method: 'average', 'complete', 'single' or 'weighted', as in scipy.

    Returns:
        The tree.

    Raises:
        ImportError: There is no scipy.
        TypeError: ``similarity`` is no floating tensor.
        ValueError: It is not square, symmetric and finite, has less than two tasks or entries
            above 1, or there is no such method.

    Source: Hong and Pavlic, "Randomly Weighted Neuromodulation in Neural Networks Facilitates
    Learning of Manifolds Common Across Tasks", section 3.2, AugmentMNIST.
    """
    op = "cluster_tasks"
    distance = 1 - _checks.similarity(op, "similarity", similarity).cpu()
    if method not in METHODS:
        raise ValueError(f"{op}: expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if float(distance.min()) < -1e-6:
        raise ValueError(
            f"{op}: expected similarity of at most 1, got {1 - float(distance.min()):.4g}"
        )
    hierarchy = _checks.scipy(op, "cluster.hierarchy")
    rows, columns = torch.triu_indices(len(distance), len(distance), 1)
    pairs = distance.clamp_min(0)[rows, columns].numpy()
    linkage = hierarchy.linkage(pairs, method, optimal_ordering=True)
    return Clustering(linkage, [int(task) for task in hierarchy.leaves_list(linkage)])
