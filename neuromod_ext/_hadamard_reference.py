"""The rotations in plain PyTorch, differentiable to any order: part of the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuromod_ext import _checks, _hadamard_checks

LEVELS = 6  # a factor of 64 x 64 is a fast matrix product, and small beside the weights


def kronecker_product(factors: Sequence[Tensor], w: Tensor) -> Tensor:
    """(F_1 ⊗ … ⊗ F_m) w of w [..., n], one factor at a time."""
    shape, before = w.shape, 1
    for factor in factors:
        size = len(factor)
        after = shape[-1] // (before * size)
        if after == 1:
            w = w.unflatten(-1, (before, size)) @ factor.T
        elif before == 1:  # of a vector a plain product, twice as fast as a batch of one
            w = factor @ w.unflatten(-1, (size, after))
        else:
            w = factor @ w.unflatten(-1, (before, size, after))
        w = w.reshape(shape)
        before *= size
    return w


def hadamard_transform(x: Tensor) -> Tensor:
    """H x over the last dimension, of a power of two of elements; H is symmetric, H H = n."""
    levels = x.shape[-1].bit_length() - 1
    if levels == 0:
        return x
    steps = -(-levels // LEVELS)
    pair = x.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    factors = []
    for i in range(steps):
        factor = pair
        for _ in range((levels + i) // steps - 1):
            factor = torch.kron(pair, factor)
        factors.append(factor)
    return kronecker_product(factors, x)


def hadamard_rotate(weights: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    """R_2 R_1 w, or R_1ᵀ R_2ᵀ w, over the last dimension: R = p^(-1/2) H D of p of the elements."""
    _hadamard_checks.hadamard_rotate(weights, signs)
    return rotated(weights, signs, inverse)


def rotated(w: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    """:func:`hadamard_rotate`, where signs may have batch dimensions, too."""
    blocks = _hadamard_checks.rotations(w.shape[-1])
    parts = signs.to(w.dtype).split([high - low for low, high in blocks], -1)
    order = list(zip(blocks, parts, strict=True))
    for (low, high), part in reversed(order) if inverse else order:
        factor, x = part * (high - low) ** -0.5, w[..., low:high]
        x = hadamard_transform(x) * factor if inverse else hadamard_transform(x * factor)
        before, after = (r.expand(*x.shape[:-1], -1) for r in (w[..., :low], w[..., high:]))
        w = torch.cat((before, x, after), -1)
    return w


def hadamard_rotate_(weights: Sequence[Tensor], signs: Tensor, inverse: bool = False) -> None:
    """:func:`hadamard_rotate` of the tensors' elements as one vector, in place."""
    op = "hadamard_rotate_"
    _hadamard_checks.hadamard_rotate_(weights, signs)
    _checks.written_memory(op, {}, **{f"weights[{i}]": t for i, t in enumerate(weights)})
    flat = rotated(torch.cat([t.flatten() for t in weights]), signs, inverse)
    for t, part in zip(weights, flat.split([t.numel() for t in weights]), strict=True):
        t.copy_(part.view(t.shape))
