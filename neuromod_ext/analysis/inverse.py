"""What a fly's hash kept of its input, seen through the pseudo-inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuromod_ext import _checks as op_checks
from neuromod_ext.analysis import _checks

_OP = "reconstruct"


def reconstruct(
    index: Tensor,
    in_features: int,
    prototypes: Tensor,
    gains: Tensor,
    *,
    noise: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Inputs that the contexts of tasks hold of each class, without the ReLU.

    .. math:: \hat x_{tc} = S^+ (R_c \odot \alpha_t v_t + \varepsilon), \qquad
              \varepsilon \sim \mathcal N(0, \sigma^2)

    S, [H, I], has ones at the inputs that each hidden unit gathers; S⁺ is its pseudo-inverse, for
    any rank of S: it comes from the eigenvectors of SᵀS, whose entries are whole numbers.

    Args:
        index: The inputs of each hidden unit, [H, n], int32 or int64, from 0 to I - 1, none twice
            in a row.
        in_features: I.
        prototypes: The rows of R, one a class, [C, H].
        gains: The contexts α_t v_t, one a task, [T, H].
        noise: σ; None is 1 / √H (the paper's 1/7840, read as a variance), 0 leaves it out.
        generator: Of the noise.

    Returns:
        [T, C, I], float64, on the device of ``gains``.

    Raises:
        TypeError: ``index`` is of another dtype, or another argument is no floating tensor.
        ValueError: Shapes that do not fit, an index out of its range or twice in a row, or a noise
            below 0 or not finite.

    Source: Hong and Pavlic, "Randomly Weighted Neuromodulation in Neural Networks Facilitates
    Learning of Manifolds Common Across Tasks", equation 3.
    """
    op_checks.tensors(_OP, index=index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{_OP}: expected index of dtype int32 or int64, got {op_checks._name(index.dtype)}; "
            "convert it with .long()"
        )
    op_checks._rank(_OP, "index", index, 2, "[H, n]")
    hidden = len(index)
    gains = _checks.matrix(_OP, "gains", gains, "[T, H]")
    prototypes = _checks.matrix(_OP, "prototypes", prototypes, "[C, H]").to(gains.device)
    for name, t in (("gains", gains), ("prototypes", prototypes)):
        if t.shape[1] != hidden:
            raise ValueError(
                f"{_OP}: expected {name} with H = {hidden} columns (the rows of index), "
                f"got {t.shape[1]}"
            )
    sigma = 1 / math.sqrt(max(hidden, 1)) if noise is None else noise
    if not 0 <= sigma < math.inf:
        raise ValueError(f"{_OP}: expected noise >= 0 and finite, got {noise}")
    dense = _dense(index.to(gains.device, torch.int64), in_features)
    seen = gains.unsqueeze(1) * prototypes
    if sigma:
        drawn = torch.randn(seen.shape, generator=generator, dtype=torch.float64)
        seen = seen + sigma * drawn.to(seen.device)
    return (seen @ dense) @ _inverse(dense.mT @ dense, hidden)


def _dense(index: Tensor, in_features: int) -> Tensor:
    """S, [H, I]."""
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    if low < 0 or high >= in_features:
        raise ValueError(
            f"{_OP}: expected index from 0 to I - 1 = {in_features - 1}, got {low} to {high}"
        )
    counts = torch.zeros(len(index), in_features, dtype=torch.float64, device=index.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    if counts.max() > 1:
        row = int((counts > 1).any(1).nonzero()[0])
        raise ValueError(f"{_OP}: expected no index twice in a row, got two alike in row {row}")
    return counts


def _inverse(gram: Tensor, hidden: int) -> Tensor:
    """The pseudo-inverse of SᵀS, [I, I]."""
    values, vectors = torch.linalg.eigh(gram)
    least = values.max() * max(hidden, len(values)) * torch.finfo(values.dtype).eps
    kept = torch.where(values > least, values.reciprocal(), 0)
    inverse: Tensor = (vectors * kept) @ vectors.mT
    return inverse
