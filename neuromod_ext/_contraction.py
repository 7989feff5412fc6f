"""The ops of a multilinear form, differentiable; :mod:`neuromod_ext.autograd` is built on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from neuromod_ext import reference
from neuromod_ext._ops import EXTENSION, OPS
from neuromod_ext._transforms import surrounded, tangents_active, transform_active
from neuromod_ext.reference import Form

Operands = Sequence[Tensor]
Contract = Callable[..., Tensor]

# Ops with a fused gradient, as eager code calls them; see neuromod_ext._derivatives.
NODES: dict[str, Callable[..., Tensor]] = {}


def raw(name: str, *args: Any) -> Any:
    """The op itself: called inside a Function, which is its derivative already."""
    with torch._C._AutoDispatchBelowAutograd():
        return OPS[name](*args)


def registered(name: str, *args: Any) -> Any:
    """The op with its registered derivative."""
    return OPS[name](*args)


def apply(function: type[Function], *args: Any) -> Tensor:
    """``function.apply``, less a look at the signature that takes longer than a small kernel."""
    if transform_active():
        return cast(Tensor, function.apply(*args))
    args = unwrap_dead_wrappers(args)
    return cast(Tensor, super(Function, function).apply(*args))  # type: ignore[misc]


def underivable(*operands: Tensor | None) -> bool:
    """Whether no derivative of a call can be asked for, in any mode."""
    if transform_active() or tangents_active():
        return False
    return not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    )


def form_vjp(
    form: Form, result: str, values: Operands, grad: Tensor, needs: Sequence[bool], call: Contract
) -> list[Tensor | None]:
    """The gradient of each operand: the contraction that yields it, given the cotangent."""
    known = dict(zip(form.operands(result), values, strict=True)) | {result: grad}
    return [
        call(form, name, *(known[other] for other in form.operands(name))) if need else None
        for name, need in zip(form.operands(result), needs, strict=True)
    ]


def form_jvp(
    form: Form, result: str, values: Operands, tangents: Sequence[Tensor | None], call: Contract
) -> Tensor | None:
    """The form is linear in each operand: replace one by its tangent, and sum."""
    total = None
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            term = call(form, result, *values[:i], tangent, *values[i + 1 :])
            total = term if total is None else total + term
    return total


def form_vmap(
    form: Form, result: str, size: int, dims: Sequence[int | None], values: Operands, call: Contract
) -> Tensor:
    """A batch of contractions. With common basis points it is one with more samples."""
    names = form.operands(result)
    basis_shared = result != "basis" and dims[names.index("basis")] is None
    moved = [v if d is None else v.movedim(d, 0) for v, d in zip(values, dims, strict=True)]
    if not basis_shared:
        return form.contract(result, moved, [d is not None for d in dims])
    flat = [
        v if name == "basis" else (v.expand(size, *v.shape) if d is None else v).flatten(0, 1)
        for name, v, d in zip(names, moved, dims, strict=True)
    ]
    out = call(form, result, *flat)
    samples = next(
        v.shape[d is not None]
        for name, v, d in zip(names, moved, dims, strict=True)
        if name != "basis"
    )
    return out.reshape(size, samples, *out.shape[1:])


class ContractionFunction(Function):
    """One op of a multilinear form; every derivative is another op of the form."""

    @staticmethod
    def forward(form: Form, result: str, *values: Tensor) -> Tensor:
        return cast(Tensor, raw(form.ops[result][0], *values))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form, ctx.result, *values = inputs
        ctx.save_for_backward(*values)
        ctx.save_for_forward(*values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        form, result, values = ctx.form, ctx.result, ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        return (None, None, *form_vjp(form, result, values, grad, needs, contract))

    @staticmethod
    def jvp(ctx: Any, _form: None, _result: None, *tangents: Tensor | None) -> Tensor | None:
        values = ctx.saved_tensors
        return form_jvp(ctx.form, ctx.result, values, tangents, contract)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], form: Form, result: str, *values: Tensor
    ) -> tuple[Tensor, int]:
        return form_vmap(form, result, info.batch_size, in_dims[2:], values, contract), 0


def use_reference() -> bool:
    """Whether the einsums run: no kernel is built, or a transform acts inside compiled code."""
    return not EXTENSION or (torch.compiler.is_compiling() and transform_active())


def contract(form: Form, result: str, *values: Tensor) -> Tensor:
    """The op of ``form`` that yields ``result``, differentiable."""
    name = form.ops[result][0]
    if use_reference():
        return cast(Tensor, getattr(reference, name)(*values))
    if torch.compiler.is_compiling():
        return cast(Tensor, registered(name, *values))
    if name in NODES and not surrounded():
        return NODES[name](*values)
    if underivable(*values):
        return cast(Tensor, raw(name, *values))
    return apply(ContractionFunction, form, result, *values)
