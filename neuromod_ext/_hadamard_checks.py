"""The errors of the rotations, in Python; the rest, and why, in :mod:`neuromod_ext._checks`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuromod_ext._checks import _device_like, _like, _name, _rank, _same_shape, _shape


def rotations(n: int) -> list[tuple[int, int]]:
    """Between which of n elements each rotation acts, the first one first.

    The first takes the first p, the largest power of two in n. The second takes the last q,
    the least power of two that is 2 (n - p) or more, but p at most. There is none where n = p.
    """
    first = 1 << (n.bit_length() - 1)
    rest = n - first
    if not rest:
        return [(0, n)]
    return [(0, first), (n - min(first, 1 << (2 * rest - 1).bit_length()), n)]


def num_signs(n: int) -> int:
    """How many signs n elements take: p + q."""
    return sum(high - low for low, high in rotations(n))


def _sums_floating(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in (torch.float64, torch.float32):
        raise TypeError(
            f"{op}: expected {name} of dtype float64 or float32, got {_name(t.dtype)}; "
            "convert it with .float()"
        )


def _signs(op: str, signs: Tensor, n: int, name: str, weights: Tensor) -> None:
    if signs.dtype != torch.int8:
        raise TypeError(f"{op}: expected signs of dtype int8, got {_name(signs.dtype)}")
    _device_like(op, "signs", signs, name, weights)
    _same_shape(op, "signs", signs, "[p + q]", [num_signs(n)])


def hadamard_rotate(weights: Tensor, signs: Tensor) -> None:
    op = "hadamard_rotate"
    _sums_floating(op, "weights", weights)
    _rank(op, "weights", weights, 1, "[..., n]", exact=False)
    n = weights.shape[-1]
    if n == 0:
        raise ValueError(
            f"{op}: expected weights of shape [..., n] with n >= 1, got {_shape(weights.shape)}"
        )
    _signs(op, signs, n, "weights", weights)


def hadamard_rotate_(weights: Sequence[Tensor], signs: Tensor) -> None:
    op = "hadamard_rotate_"
    for i, t in enumerate(weights):
        _sums_floating(op, f"weights[{i}]", t)
        if i > 0:
            _like(op, f"weights[{i}]", t, "weights[0]", weights[0])
    n = sum(t.numel() for t in weights)
    if n == 0:
        raise ValueError(f"{op}: expected weights with at least one element, got none")
    _signs(op, signs, n, "weights[0]", weights[0])
