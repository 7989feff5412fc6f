"""The ops made differentiable, to any order, under every transform of torch.

Which wrapping a call takes depends on what surrounds it:

- eager (``vmap``, ``jvp``, ``grad`` and their compositions included): an autograd ``Function``
  with ``backward``, ``jvp`` and ``vmap``;
- while ``torch.compile`` or ``torch.export`` traces: the registered op, whose derivative formula
  is registered too;
- a ``torch.func`` transform inside compiled code: the einsum reference, which Dynamo sees through.

No single wrapping does all three: a ``Function`` with ``jvp`` is refused by Dynamo, and a
registered op drops tangents in eager ``jvp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from neuromod_ext import reference
from neuromod_ext._ops import EXTENSION, OPS
from neuromod_ext._transforms import transform_active
from neuromod_ext.reference import INTERPOLATE_WEIGHTS, MANIFOLD_LINEAR, Form

Operands = Sequence[Tensor]
Contract = Callable[..., Tensor]


def _raw(name: str, *args: Any) -> Tensor:
    """The op itself: called inside a Function, which is its derivative already."""
    with torch._C._AutoDispatchBelowAutograd():
        return OPS[name](*args)


def _vjp(
    form: Form, result: str, values: Operands, grad: Tensor, needs: Sequence[bool], call: Contract
) -> list[Tensor | None]:
    """The gradient of each operand: the contraction that yields it, given the cotangent."""
    known = dict(zip(form.operands(result), values, strict=True)) | {result: grad}
    return [
        call(form, name, *(known[other] for other in form.operands(name))) if need else None
        for name, need in zip(form.operands(result), needs, strict=True)
    ]


def _jvp(
    form: Form, result: str, values: Operands, tangents: Sequence[Tensor | None], call: Contract
) -> Tensor | None:
    """The form is linear in each operand: replace one by its tangent, and sum."""
    total = None
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            term = call(form, result, *values[:i], tangent, *values[i + 1 :])
            total = term if total is None else total + term
    return total


def _vmap(
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
    return out.reshape(size, -1, *out.shape[1:])


class ContractionFunction(Function):
    """One op of a multilinear form; every derivative is another op of the form."""

    @staticmethod
    def forward(form: Form, result: str, *values: Tensor) -> Tensor:
        return _raw(form.ops[result][0], *values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form, ctx.result, *values = inputs
        ctx.save_for_backward(*values)
        ctx.save_for_forward(*values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *_vjp(ctx.form, ctx.result, ctx.saved_tensors, grad, needs, ContractionFunction.apply),
        )

    @staticmethod
    def jvp(ctx: Any, _form: None, _result: None, *tangents: Tensor | None) -> Tensor | None:
        values = ctx.saved_tensors
        return _jvp(ctx.form, ctx.result, values, tangents, ContractionFunction.apply)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], form: Form, result: str, *values: Tensor
    ) -> tuple[Tensor, int]:
        apply = ContractionFunction.apply
        return _vmap(form, result, info.batch_size, in_dims[2:], values, apply), 0


def _add_bias(output: Tensor, coeff: Tensor, bias: Tensor, middle: int) -> Tensor:
    """output[b,t] + Σ_k c[b,k] β[k], in the dtype of output, over ``middle`` dimensions t.

    All may have batch dimensions in front.
    """
    blend = torch.matmul(coeff, bias.to(coeff.dtype))
    blend = blend.reshape(*blend.shape[:-1], *(1,) * middle, blend.shape[-1])
    return (output.to(coeff.dtype) + blend).to(output.dtype)


class ManifoldLinearFunction(Function):
    """manifold_linear with a bias: a contraction, and a term bilinear in coeff and bias."""

    @staticmethod
    def forward(input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor) -> Tensor:
        return _raw("manifold_linear", input, basis, coeff, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        apply = ContractionFunction.apply
        return _manifold_linear_vjp(ctx.saved_tensors, grad, ctx.needs_input_grad, apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        *values, bias = ctx.saved_tensors
        middle, coeff = values[0].dim() - 2, values[2]
        total = _jvp(MANIFOLD_LINEAR, "output", values, tangents[:3], ContractionFunction.apply)
        if total is None:  # only the bias moves
            total = values[0].new_zeros(*values[0].shape[:-1], bias.shape[-1])
        if tangents[2] is not None:
            total = _add_bias(total, tangents[2], bias, middle)
        if tangents[3] is not None:
            total = _add_bias(total, coeff, tangents[3], middle)
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        values = args[:3]
        middle = values[0].dim() - (3 if in_dims[0] is not None else 2)
        coeff, bias = (
            v if d is None else v.movedim(d, 0) for v, d in zip(args[2:], in_dims[2:], strict=True)
        )
        apply = ContractionFunction.apply
        if all(d is None for d in in_dims[:3]):
            out = contract(MANIFOLD_LINEAR, "output", *values)
            out = out.expand(info.batch_size, *out.shape)
        else:
            out = _vmap(MANIFOLD_LINEAR, "output", info.batch_size, in_dims[:3], values, apply)
        return _add_bias(out, coeff, bias, middle), 0


def _manifold_linear_vjp(
    saved: Sequence[Any], grad: Tensor, needs: Sequence[bool], call: Contract
) -> tuple[Tensor | None, ...]:
    """The gradients of input, basis, coeff and bias (which may be None)."""
    *values, bias = saved
    grads = _vjp(MANIFOLD_LINEAR, "output", values, grad, needs[:3], call)
    if bias is None:
        return (*grads, None)
    coeff = values[2]
    sample_grad = grad.to(coeff.dtype)
    if grad.dim() > 2:
        sample_grad = sample_grad.sum(tuple(range(1, grad.dim() - 1)))
    if grads[2] is not None:
        grads[2] = grads[2] + torch.matmul(sample_grad, bias.to(coeff.dtype).mT)
    grad_bias = torch.matmul(coeff.mT, sample_grad).to(bias.dtype) if needs[3] else None
    return (*grads, grad_bias)


class ManifoldMetricFunction(Function):
    """manifold_metric; its derivatives are small matrix products of torch's."""

    @staticmethod
    def forward(coeff: Tensor, weight: Tensor | None) -> Tensor:
        return _raw("manifold_metric", coeff, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _manifold_metric_vjp(ctx.saved_tensors, grad, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        coeff, weight = ctx.saved_tensors
        coeff_tangent, weight_tangent = tangents
        total = None
        if coeff_tangent is not None:
            weighted = coeff / coeff.shape[0] if weight is None else coeff * weight.unsqueeze(-1)
            half = torch.matmul(weighted.mT, coeff_tangent)
            total = half + half.mT
        if weight_tangent is not None:
            moved = reference.weighted_gram(coeff, weight_tangent)
            total = moved if total is None else total + moved
        return total

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None
    ) -> tuple[Tensor, int]:
        coeff, weight = (
            v if v is None or d is None else v.movedim(d, 0)
            for v, d in zip(args, in_dims, strict=True)
        )
        assert coeff is not None
        return reference.weighted_gram(coeff, weight), 0


def _manifold_metric_vjp(
    saved: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    coeff, weight = saved
    grad_coeff = grad_weight = None
    if needs[0]:
        grad_coeff = torch.matmul(coeff, grad + grad.mT)
        scale = 1 / coeff.shape[0] if weight is None else weight.unsqueeze(-1)
        grad_coeff = grad_coeff * scale
    if weight is not None and needs[1]:
        grad_weight = (torch.matmul(coeff, grad) * coeff).sum(-1)
    return grad_coeff, grad_weight


def _use_reference() -> bool:
    return not EXTENSION or (torch.compiler.is_compiling() and transform_active())


def _apply(function: type[Function], *args: Any) -> Tensor:
    return cast(Tensor, function.apply(*args))


def contract(form: Form, result: str, *values: Tensor) -> Tensor:
    """The op of ``form`` that yields ``result``, differentiable."""
    name = form.ops[result][0]
    if _use_reference():
        return cast(Tensor, getattr(reference, name)(*values))
    if torch.compiler.is_compiling():
        return OPS[name](*values)
    return _apply(ContractionFunction, form, result, *values)


def manifold_linear(input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None) -> Tensor:
    """The op, differentiable; shapes as the kernel takes them."""
    if bias is None:
        return contract(MANIFOLD_LINEAR, "output", input, basis, coeff)
    if _use_reference():
        return reference.manifold_linear(input, basis, coeff, bias)
    if torch.compiler.is_compiling():
        return OPS["manifold_linear"](input, basis, coeff, bias)
    return _apply(ManifoldLinearFunction, input, basis, coeff, bias)


def interpolate_weights(basis: Tensor, coeff: Tensor) -> Tensor:
    """The op, differentiable; shapes as the kernel takes them."""
    return contract(INTERPOLATE_WEIGHTS, "output", basis, coeff)


def manifold_metric(coeff: Tensor, weight: Tensor | None) -> Tensor:
    """The op, differentiable; shapes as the kernel takes them."""
    if _use_reference():
        return reference.manifold_metric(coeff, weight)
    if torch.compiler.is_compiling():
        return OPS["manifold_metric"](coeff, weight)
    return _apply(ManifoldMetricFunction, coeff, weight)


def _register_autograd() -> None:
    """The same derivative formulas for the registered ops, which compiled code calls."""

    def call(form: Form, result: str, *values: Tensor) -> Tensor:
        return OPS[form.ops[result][0]](*values)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def register(name: str, backward: Callable[..., Any]) -> None:
        torch.library.register_autograd(f"neuromod_ext::{name}", backward, setup_context=save)

    def register_contraction(form: Form, result: str) -> None:
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return tuple(_vjp(form, result, ctx.saved_tensors, grad, ctx.needs_input_grad, call))

        register(form.ops[result][0], backward)

    for form in (MANIFOLD_LINEAR, INTERPOLATE_WEIGHTS):
        for result, (name, _) in form.ops.items():
            if name != "manifold_linear":
                register_contraction(form, result)
    register(
        "manifold_linear",
        lambda ctx, grad: _manifold_linear_vjp(ctx.saved_tensors, grad, ctx.needs_input_grad, call),
    )
    register(
        "manifold_metric",
        lambda ctx, grad: _manifold_metric_vjp(ctx.saved_tensors, grad, ctx.needs_input_grad),
    )


if EXTENSION:
    _register_autograd()
