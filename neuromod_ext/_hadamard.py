"""Random rotations of any number of elements in O(n log n), and their derivatives.

A rotation is linear, and its transpose its inverse: every derivative is a rotation. Which of the
wrappings a call takes: :mod:`neuromod_ext.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from neuromod_ext import _checks, _hadamard_reference
from neuromod_ext._contraction import apply, raw, registered, underivable, use_reference
from neuromod_ext._ops import EXTENSION, OPS
from neuromod_ext._transforms import refuse_transforms


class HadamardRotateFunction(Function):
    """hadamard_rotate."""

    @staticmethod
    def forward(weights: Tensor, signs: Tensor, inverse: bool) -> Tensor:
        return cast(Tensor, raw("hadamard_rotate", weights, signs, inverse))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, signs, ctx.inverse = inputs
        ctx.save_for_backward(signs)
        ctx.save_for_forward(signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (signs,) = ctx.saved_tensors
        return rotate(grad, signs, not ctx.inverse), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (signs,) = ctx.saved_tensors
        return rotate(tangent, signs, ctx.inverse)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], weights: Tensor, signs: Tensor, inverse: bool
    ) -> tuple[Tensor, int]:
        if in_dims[0] is not None:
            weights = weights.movedim(in_dims[0], 0)
        if in_dims[1] is None:
            return rotate(weights, signs, inverse), 0
        signs = signs.movedim(in_dims[1], 0)
        if in_dims[0] is None:
            weights = weights.expand(info.batch_size, *weights.shape)
        middle = (1,) * (weights.dim() - 2)
        signs = signs.reshape(len(signs), *middle, signs.shape[-1])
        return _hadamard_reference.rotated(weights, signs, inverse), 0


def rotate(weights: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    """The op, differentiable; dtypes as the kernel takes them."""
    if use_reference():
        return _hadamard_reference.hadamard_rotate(weights, signs, inverse)
    if torch.compiler.is_compiling():
        return cast(Tensor, registered("hadamard_rotate", weights, signs, inverse))
    if underivable(weights):
        return cast(Tensor, raw("hadamard_rotate", weights, signs, inverse))
    return apply(HadamardRotateFunction, weights, signs, inverse)


def hadamard_rotate(weights: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    r"""Rotate n elements by Hadamard's matrix and random signs, in O(n log n).

    .. math:: y = R_2 R_1 w, \qquad R = p^{-1/2} H_p D \text{ on } p \text{ of the elements}

    H_p is Hadamard's matrix, D a diagonal of signs. R_1 acts on the first p elements, p the largest
    power of two in n. R_2 acts on the last q, the least power of two that is 2 (n - p) or more, but
    p at most; it is left out where n = p. The inverse is the transpose.

    Args:
        weights: w, [..., n]: float64, float32, bfloat16 or float16.
        signs: D of R_1, then of R_2, [p + q], int8, each 1 or -1 (which is not looked at).
        inverse: R_1ᵀ R_2ᵀ w instead.

    Returns:
        y, [..., n], of the dtype of ``weights``, also under autocast: halves are rotated in
        float32 and rounded once.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.

    Source: the fast rotation of Ailon and Chazelle (2009); two of them for any n are our choice.
    """
    op = "hadamard_rotate"
    _checks.tensors(op, weights=weights, signs=signs)
    if weights.dtype in (torch.bfloat16, torch.float16):
        return hadamard_rotate(weights.float(), signs, inverse).to(weights.dtype)
    if _checks.autocast_enabled(weights.device):
        with torch.autocast(weights.device.type, enabled=False):
            return rotate(weights, signs, inverse)
    return rotate(weights, signs, inverse)


@torch.no_grad()
def hadamard_rotate_(weights: Sequence[Tensor], signs: Tensor, inverse: bool = False) -> None:
    """:func:`hadamard_rotate` in place, of the elements of several tensors as one vector.

    On the CPU they are rotated where they lie (non-contiguous ones as copies), so parameters of a
    network need not be brought into one vector. Not differentiable.

    Args:
        weights: At least one element in all, float64 or float32, changed in place.
        signs: As there, for as many elements as all tensors have.
        inverse: Whether to rotate back.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit, or tensors overlap.
        NotImplementedError: under a ``torch.func`` transform.
    """
    op = "hadamard_rotate_"
    _checks.tensors(op, **{f"weights[{i}]": t for i, t in enumerate(weights)}, signs=signs)
    refuse_transforms(op)
    OPS[op](list(weights), signs, inverse)


def _register_autograd() -> None:
    """The same derivative formula for the registered op, which compiled code calls."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.inverse = inputs[2] if len(inputs) > 2 else False

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (signs,) = ctx.saved_tensors
        return registered("hadamard_rotate", grad, signs, not ctx.inverse), None, None

    name = "neuromod_ext::hadamard_rotate"
    torch.library.register_autograd(name, backward, setup_context=save)


if EXTENSION:
    _register_autograd()
