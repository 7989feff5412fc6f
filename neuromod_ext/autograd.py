"""The ops made differentiable, to any order, under every transform of torch.

Which wrapping a call takes depends on what surrounds it:

- eager (``vmap``, ``jvp``, ``grad`` and their compositions included): an autograd ``Function``
  with ``backward``, ``jvp`` and ``vmap``; the op itself where no derivative can be asked for;
- while ``torch.compile`` or ``torch.export`` traces: the registered op, whose derivative formula
  is registered too;
- a ``torch.func`` transform inside compiled code: the einsum reference, which Dynamo sees through.

No single wrapping does all three: a ``Function`` with ``jvp`` is refused by Dynamo, and a
registered op drops tangents in eager ``jvp``.

The backward of ``manifold_linear`` takes one of two ways. If nothing can differentiate it in turn,
one fused op yields all gradients; otherwise each gradient is an op of the form by itself, which is
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from neuromod_ext import _checks, reference
from neuromod_ext._contraction import (
    Contract,
    apply,
    contract,
    form_jvp,
    form_vjp,
    form_vmap,
    fuses,
    raw,
    registered,
    underivable,
    use_reference,
)
from neuromod_ext._ops import EXTENSION
from neuromod_ext._transforms import tangents_active, transform_active
from neuromod_ext.reference import INTERPOLATE_WEIGHTS, MANIFOLD_LINEAR, Form, densified, positions


def _add_bias(output: Tensor, coeff: Tensor, bias: Tensor, middle: int) -> Tensor:
    """output[b,t] + Σ_k c[b,k] β[k], in the dtype of output, over ``middle`` dimensions t.

    All may have batch dimensions in front.
    """
    blend = torch.matmul(coeff, bias.to(coeff.dtype))
    blend = blend.reshape(*blend.shape[:-1], *(1,) * middle, blend.shape[-1])
    return (output.to(coeff.dtype) + blend).to(output.dtype)


class ManifoldLinearFunction(Function):
    """manifold_linear and manifold_linear_local: a contraction, and a term of coeff and bias."""

    @staticmethod
    def forward(
        input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None, index: Tensor | None
    ) -> Tensor:
        return _linear(raw, input, basis, coeff, bias, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled() or transform_active() or tangents_active():
            return _manifold_linear_vjp(saved, grad, needs, contract)
        return _manifold_linear_fused_vjp(saved, grad, needs, raw)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        input, basis, coeff, bias, index = ctx.saved_tensors
        input_tangent, basis_tangent, coeff_tangent, bias_tangent, _ = tangents
        if index is not None:
            coeff = densified(index, coeff, basis.shape[0])
            if coeff_tangent is not None:
                coeff_tangent = densified(index, coeff_tangent, basis.shape[0])
        values, moved = (input, basis, coeff), (input_tangent, basis_tangent, coeff_tangent)
        total = form_jvp(MANIFOLD_LINEAR, "output", values, moved, contract)
        if total is None:  # only the bias moves
            total = input.new_zeros(*input.shape[:-1], basis.shape[1])
        if coeff_tangent is not None and bias is not None:
            total = _add_bias(total, coeff_tangent, bias, input.dim() - 2)
        if bias_tangent is not None:
            total = _add_bias(total, coeff, bias_tangent, input.dim() - 2)
        return total

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None
    ) -> tuple[Tensor, int]:
        """Only without an index: see :func:`manifold_linear`."""
        values, dims = cast(tuple[Tensor, ...], args[:3]), in_dims[:3]
        if all(d is None for d in dims):
            out = contract(MANIFOLD_LINEAR, "output", *values)
            out = out.expand(info.batch_size, *out.shape)
        else:
            out = form_vmap(MANIFOLD_LINEAR, "output", info.batch_size, dims, values, contract)
        coeff, bias = (
            v if v is None or d is None else v.movedim(d, 0)
            for v, d in zip(args[2:4], in_dims[2:4], strict=True)
        )
        if bias is not None:
            assert coeff is not None
            out = _add_bias(out, coeff, bias, values[0].dim() - (3 if dims[0] is not None else 2))
        return out, 0


def _linear(
    call: Callable[..., Any],
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
) -> Tensor:
    """The op that goes with an index, or without one; ``call`` takes its name and arguments."""
    if index is None:
        return cast(Tensor, call("manifold_linear", input, basis, coeff, bias))
    return cast(Tensor, call("manifold_linear_local", input, basis, index, coeff, bias))


def _manifold_linear_fused_vjp(
    saved: Sequence[Any], grad: Tensor, needs: Sequence[bool], call: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, basis, coeff, bias and index by one op, which has no derivative."""
    input, basis, coeff, bias, index = saved
    needed = list(needs[:4])
    if index is None:
        grads = call("manifold_linear_backward", grad, input, basis, coeff, bias, needed)
    else:
        name = "manifold_linear_local_backward"
        grads = call(name, grad, input, basis, index, coeff, bias, needed)
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), None)


def _manifold_linear_vjp(
    saved: Sequence[Any], grad: Tensor, needs: Sequence[bool], call: Contract
) -> tuple[Tensor | None, ...]:
    """The same, differentiable."""
    input, basis, coeff, bias, index = saved
    given = coeff
    if index is not None:
        coeff = densified(index, coeff, basis.shape[0])
    values = (input, basis, coeff)
    grads = form_vjp(MANIFOLD_LINEAR, "output", values, grad, needs[:3], call)
    grad_bias = None
    if bias is not None:
        sample_grad = grad.to(coeff.dtype)
        if grad.dim() > 2:
            sample_grad = sample_grad.sum(tuple(range(1, grad.dim() - 1)))
        if grads[2] is not None:
            grads[2] = grads[2] + torch.matmul(sample_grad, bias.to(coeff.dtype).mT)
        if needs[3]:
            grad_bias = torch.matmul(coeff.mT, sample_grad).to(bias.dtype)
    if index is not None and grads[2] is not None:
        grads[2] = grads[2].gather(-1, positions(index, given.shape[-1], basis.shape[0]))
    return (*grads, grad_bias, None)


class ManifoldMetricFunction(Function):
    """manifold_metric; its derivatives are small matrix products of torch's."""

    @staticmethod
    def forward(coeff: Tensor, weight: Tensor | None) -> Tensor:
        return cast(Tensor, raw("manifold_metric", coeff, weight))

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


def manifold_linear(
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    index: Tensor | None = None,
) -> Tensor:
    """The op, or with an index manifold_linear_local, differentiable; shapes as kernels take them.

    A transform of ``torch.func`` sees a local call as a dense one.
    """
    if use_reference() or (index is not None and transform_active()):
        if index is not None:
            _checks.manifold_linear_local(input, basis, index, coeff, bias)
            return manifold_linear(input, basis, densified(index, coeff, basis.shape[0]), bias)
        return reference.manifold_linear(input, basis, coeff, bias)
    if torch.compiler.is_compiling():
        return _linear(registered, input, basis, coeff, bias, index)
    if underivable(input, basis, coeff, bias):
        return _linear(raw, input, basis, coeff, bias, index)
    return apply(ManifoldLinearFunction, input, basis, coeff, bias, index)


def interpolate_weights(basis: Tensor, coeff: Tensor) -> Tensor:
    """The op, differentiable; shapes as the kernel takes them."""
    return contract(INTERPOLATE_WEIGHTS, "output", basis, coeff)


def manifold_metric(coeff: Tensor, weight: Tensor | None) -> Tensor:
    """The op, differentiable; shapes as the kernel takes them."""
    if use_reference():
        return reference.manifold_metric(coeff, weight)
    if torch.compiler.is_compiling():
        return cast(Tensor, registered("manifold_metric", coeff, weight))
    if underivable(coeff, weight):
        return cast(Tensor, raw("manifold_metric", coeff, weight))
    return apply(ManifoldMetricFunction, coeff, weight)


def _register_autograd() -> None:
    """The same derivative formulas for the registered ops, which compiled code calls."""

    def call(form: Form, result: str, *values: Tensor) -> Tensor:
        return cast(Tensor, registered(form.ops[result][0], *values))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(t for t in inputs if t is None or isinstance(t, Tensor)))

    def register(name: str, backward: Callable[..., Any]) -> None:
        torch.library.register_autograd(f"neuromod_ext::{name}", backward, setup_context=save)

    def register_contraction(form: Form, result: str) -> None:
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            values, needs = ctx.saved_tensors, ctx.needs_input_grad
            if fuses(form, result, needs):
                return tuple(registered(form.backward, grad, *values, list(needs)))
            return tuple(form_vjp(form, result, values, grad, needs, call))

        register(form.ops[result][0], backward)

    def linear_gradients(
        saved: Sequence[Any], grad: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _manifold_linear_vjp(saved, grad, needs, call)
        return _manifold_linear_fused_vjp(saved, grad, needs, registered)

    def linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = (*ctx.needs_input_grad, False)[:4]  # torch leaves a default argument out
        return linear_gradients((*ctx.saved_tensors, None), grad, needs)[:4]

    def linear_local(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, basis, index, coeff, bias = ctx.saved_tensors
        needs = (*ctx.needs_input_grad, False)[:5]
        needs = needs[:2] + needs[3:]
        grads = linear_gradients((input, basis, coeff, bias, index), grad, needs)
        return grads[0], grads[1], None, grads[2], grads[3]

    def register_underivable(name: str, form: Form) -> None:
        others = ", ".join(op for result, (op, _) in form.ops.items() if result != "output")

        def refuse(ctx: Any, *grads: Tensor | None) -> None:
            raise NotImplementedError(
                f"{name}: expected no derivative of this op to be asked for; call {others}, "
                "which have one"
            )

        register(name, refuse)

    for form in (MANIFOLD_LINEAR, INTERPOLATE_WEIGHTS):
        for result, (name, _) in form.ops.items():
            if name != "manifold_linear":
                register_contraction(form, result)
    register("manifold_linear", linear)
    register("manifold_linear_local", linear_local)
    for form in (MANIFOLD_LINEAR, INTERPOLATE_WEIGHTS):
        register_underivable(form.backward, form)
    register_underivable("manifold_linear_local_backward", MANIFOLD_LINEAR)
    register(
        "manifold_metric",
        lambda ctx, grad: _manifold_metric_vjp(ctx.saved_tensors, grad, ctx.needs_input_grad),
    )


if EXTENSION:
    _register_autograd()
