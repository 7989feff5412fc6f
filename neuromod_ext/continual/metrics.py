"""The usual measures of continual learning, of an accuracy matrix.

Row i, column j of the matrix is the accuracy at task j after learning task i; entries above the
diagonal, of tasks not learned yet, may be NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn


def accuracy_matrix(rows: Iterable[Sequence[float]]) -> NDArray[np.float64]:
    """Rows of growing length, as :func:`learn_stream` yields them, as a matrix.

    Args:
        rows: Row i: the accuracies at tasks 0 to i.

    Returns:
        A, [T, T], NaN above the diagonal.

    Raises:
        ValueError: No row, or one of another length.
    """
    given = list(rows)
    matrix = np.full((len(given), len(given)), np.nan)
    for i, row in enumerate(given):
        if len(row) != i + 1:
            raise ValueError(
                f"accuracy_matrix: expected {i + 1} numbers in row {i}, got {len(row)}"
            )
        matrix[i, : i + 1] = row
    if not given:
        raise ValueError("accuracy_matrix: expected at least one row, got none")
    return matrix


def average_accuracy(matrix: ArrayLike) -> float:
    r"""Mean accuracy at all tasks, after the last.

    .. math:: \mathrm{ACC} = \frac1T \sum_j A_{T-1,j}

    Args:
        matrix: A, [T, T].

    Returns:
        In the unit of the matrix.

    Raises:
        ValueError: The matrix is not square, or has a NaN where there must be an accuracy.

    Source: Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning", 2017.
    """
    return float(_learned("average_accuracy", matrix)[-1].mean())


def forgetting(matrix: ArrayLike) -> float:
    r"""Mean loss of accuracy from a task's best moment to the end; 0 with a single task.

    .. math:: F = \frac1{T-1} \sum_{j<T-1}
              \left( \max_{j \le i < T-1} A_{ij} - A_{T-1,j} \right)

    Args:
        matrix: A, [T, T].

    Returns:
        In the unit of the matrix; below 0 where later tasks helped.

    Raises:
        ValueError: The matrix is not square, or has a NaN where there must be an accuracy.

    Source: Chaudhry et al., "Riemannian walk for incremental learning", 2018. The maximum is over
    what followed the task itself.
    """
    learned = _learned("forgetting", matrix)
    if len(learned) == 1:
        return 0.0
    best = np.where(np.tri(len(learned), dtype=bool), learned, -np.inf)[:-1].max(0)
    return float((best - learned[-1])[:-1].mean())


def parameters_per_task(model: nn.Module, tasks: int) -> float:
    """Numbers that training wrote and that must be stored, by task.

    All parameters count, of the task at hand or frozen; fixed random weights are no parameters.

    Args:
        model: After it has learned ``tasks`` tasks.
        tasks: How many.

    Returns:
        Parameters / tasks.

    Raises:
        ValueError: ``tasks`` is below 1.
    """
    if tasks < 1:
        raise ValueError(f"parameters_per_task: expected tasks of at least 1, got {tasks}")
    return sum(p.numel() for p in model.parameters()) / tasks


def _learned(op: str, matrix: ArrayLike) -> NDArray[np.float64]:
    try:
        values = np.asarray(matrix, dtype=np.float64)
    except ValueError as error:
        raise ValueError(
            f"{op}: expected matrix of shape [T, T], got rows that differ in length; pass "
            "accuracy_matrix(rows)"
        ) from error
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise ValueError(f"{op}: expected matrix of shape [T, T], got {list(values.shape)}")
    missing = np.isnan(values) & np.tri(len(values), dtype=bool)
    if missing.any():
        row, column = np.argwhere(missing)[0]
        raise ValueError(
            f"{op}: expected an accuracy at task {column} after task {row}, got NaN; "
            "only entries above the diagonal may be missing"
        )
    return values
