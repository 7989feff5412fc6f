"""The op manifold_conv made differentiable, to any order.

As for manifold_linear (:mod:`neuromod_ext.autograd`), but the op stands aside where a transform or
tangents surround a call: there, and where the gradient is differentiated in turn, torch's own
grouped convolution and the interpolation of weights, both differentiable, take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from neuromod_ext._contraction import NODES, Contract, registered
from neuromod_ext._conv_checks import Options
from neuromod_ext._derivatives import Gradients, differentiable
from neuromod_ext.reference import INTERPOLATE_WEIGHTS


def _vjp(call: Contract, args: Sequence[Any], grad: Tensor, needs: Sequence[bool]) -> Gradients:
    """The gradients of input, basis, coeff and bias, differentiable: by each sample's kernel."""
    with torch.autocast(grad.device.type, enabled=False):  # sums keep the dtype of coeff
        return _full_precision_vjp(args[:4], grad, needs, Options(*args[4:]), call)


def _full_precision_vjp(
    saved: Sequence[Any], grad: Tensor, needs: Sequence[bool], options: Options, call: Contract
) -> Gradients:
    input, basis, coeff, bias = saved
    weight = call(INTERPOLATE_WEIGHTS, "output", basis, coeff)
    of_weight = needs[1] or needs[2]
    grad_input, grad_weight = _conv_vjp(input, weight, grad, options, needs[0], of_weight)
    grad_basis = grad_coeff = grad_bias = None
    if needs[1]:
        grad_basis = call(INTERPOLATE_WEIGHTS, "basis", grad_weight, coeff)
    if needs[2]:
        grad_coeff = call(INTERPOLATE_WEIGHTS, "coeff", grad_weight, basis)
    if bias is not None and (needs[2] or needs[3]):
        sample_grad = grad.to(coeff.dtype).flatten(2).sum(2)
        if grad_coeff is not None:
            grad_coeff = grad_coeff + torch.matmul(sample_grad, bias.to(coeff.dtype).mT)
        if needs[3]:
            grad_bias = torch.matmul(coeff.mT, sample_grad).to(bias.dtype)
    return grad_input, grad_basis, grad_coeff, grad_bias


def _conv_vjp(
    input: Tensor,
    weight: Tensor,
    grad: Tensor,
    options: Options,
    input_needed: bool,
    weight_needed: bool,
) -> tuple[Any, Any]:
    """The gradients of a convolution of each sample with its own kernel."""
    if not (input_needed or weight_needed):
        return None, None
    if 0 in (input.numel(), weight.numel(), grad.numel()):  # which torch's convolution refuses
        zeros = torch.zeros_like(input), torch.zeros_like(weight)
        return zeros[0] if input_needed else None, zeros[1] if weight_needed else None
    samples, (stride, padding, dilation, groups) = input.shape[0], options
    grad_rows, input_rows, kernels = (t.flatten(0, 1) for t in (grad, input, weight))
    grads = torch.ops.aten.convolution_backward(
        grad_rows.unsqueeze(0),
        input_rows.unsqueeze(0),
        kernels,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        samples * groups,
        [input_needed, weight_needed, False],
    )
    return (
        grads[0].reshape(input.shape) if input_needed else None,
        grads[1].reshape(weight.shape) if weight_needed else None,
    )


def manifold_conv(
    input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None, options: Options
) -> Tensor:
    """The op, differentiable; not for a call that a transform or tangents surround."""
    if torch.compiler.is_compiling():
        return cast(Tensor, registered("manifold_conv", input, basis, coeff, bias, *options))
    return NODES["manifold_conv"](input, basis, coeff, bias, *options)


differentiable("manifold_conv", (0, 1, 2, 3), _vjp)
