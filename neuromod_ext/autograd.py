"""The ops made differentiable, to any order, under every transform of torch.

Which wrapping a call takes depends on what surrounds it:

- eager: a node of the graph that is made in C++ (csrc/fused_function.cpp), in a fraction of the
  time that Python takes; the op itself where no derivative can be asked for;
- ``vmap``, ``jvp``, ``grad``, their compositions and forward-mode tangents: an autograd
  ``Function`` with ``backward``, ``jvp`` and ``vmap``;
- while ``torch.compile`` or ``torch.export`` traces: the registered op, whose derivative formula
  is registered too;
- a ``torch.func`` transform inside compiled code: the einsum reference, which Dynamo sees through.

No single wrapping does all: a ``Function`` with ``jvp`` is refused by Dynamo, a registered op drops
tangents in eager ``jvp``, and torch maps no node made in C++.

Backward takes one of two ways. If nothing can differentiate it in turn, one fused op yields all
gradients; otherwise each gradient is an op of the form by itself, which is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from neuromod_ext import _checks, reference
from neuromod_ext._contraction import (
    NODES,
    Contract,
    apply,
    contract,
    form_jvp,
    form_vjp,
    form_vmap,
    raw,
    registered,
    underivable,
    use_reference,
)
from neuromod_ext._derivatives import Gradients, differentiable
from neuromod_ext._ops import EXTENSION
from neuromod_ext._transforms import surrounded, transform_active
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
        return (*_linear_vjp(contract, ctx.saved_tensors, grad, ctx.needs_input_grad[:4]), None)

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


def _node(name: str, *args: Any) -> Tensor:
    return NODES[name](*args)


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


def _linear_vjp(
    call: Contract, args: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> Gradients:
    """The gradients of input, basis, coeff and bias, differentiable; an index may follow those."""
    input, basis, given, bias, *index = args
    coeff, local = given, bool(index) and index[0] is not None
    if local:
        coeff = densified(index[0], coeff, basis.shape[0])
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
    if local and grads[2] is not None:
        grads[2] = grads[2].gather(-1, positions(index[0], given.shape[-1], basis.shape[0]))
    return (*grads, grad_bias)


def _local_vjp(
    call: Contract, args: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> Gradients:
    input, basis, index, coeff, bias = args
    return _linear_vjp(call, (input, basis, coeff, bias, index), grad, needs)


def _interpolate_vjp(
    call: Contract, args: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> Gradients:
    return form_vjp(INTERPOLATE_WEIGHTS, "output", args, grad, needs, call)


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
        both = grad + grad.mT
        if weight is None:
            grad_coeff = torch.matmul(coeff, both / coeff.shape[0])
        else:
            grad_coeff = torch.matmul(coeff, both) * weight.unsqueeze(-1)
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
    if not surrounded():
        return _linear(_node, input, basis, coeff, bias, index)
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
    """The same derivative formulas for the other registered ops, which compiled code calls."""

    def call(form: Form, result: str, *values: Tensor) -> Tensor:
        return cast(Tensor, registered(form.ops[result][0], *values))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(t for t in inputs if t is None or isinstance(t, Tensor)))

    def register(name: str, backward: Callable[..., Any]) -> None:
        torch.library.register_autograd(f"neuromod_ext::{name}", backward, setup_context=save)

    def register_contraction(form: Form, result: str) -> None:
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            values, needs = ctx.saved_tensors, ctx.needs_input_grad
            return tuple(form_vjp(form, result, values, grad, needs, call))

        register(form.ops[result][0], backward)

    for form in (MANIFOLD_LINEAR, INTERPOLATE_WEIGHTS):
        for result in form.ops:
            if result != "output":
                register_contraction(form, result)
    register(
        "manifold_metric",
        lambda ctx, grad: _manifold_metric_vjp(ctx.saved_tensors, grad, ctx.needs_input_grad),
    )


differentiable("manifold_linear", (0, 1, 2, 3), _linear_vjp)
differentiable("manifold_linear_local", (0, 1, 3, 4), _local_vjp)
differentiable("interpolate_weights", (0, 1), _interpolate_vjp)
if EXTENSION:
    _register_autograd()
