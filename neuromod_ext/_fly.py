"""Fly hashing, and linear maps under gains: shared fixed weights that a task modulates.

A kernel computes ``fly_hash`` and ``fly_readout`` wherever no transform of ``torch.func`` and no
tangent surrounds the call; there, and where the gradient is differentiated in turn, plain PyTorch
(:mod:`neuromod_ext._fly_reference`) takes its place, which is differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext import _checks, _fly_checks, reference
from neuromod_ext._contraction import NODES, Contract, registered, use_reference
from neuromod_ext._derivatives import Gradients, differentiable
from neuromod_ext._transforms import low_precision, size_left_open, surrounded


def _hash_vjp(
    call: Contract, args: Sequence[Any], grad: Tensor, needed: Sequence[bool]
) -> Gradients:
    return (reference.fly_hash_backward(grad, *args),)


def _readout_vjp(
    call: Contract, args: Sequence[Any], grad: Tensor, needed: Sequence[bool]
) -> Gradients:
    input, index, gain, readout, task = args
    with torch.autocast(grad.device.type, enabled=False):  # sums keep their dtype
        grads = reference.fly_readout_backward(grad, input, index, gain, readout, task, needed)
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


def _fly_hash(input: Tensor, index: Tensor) -> Tensor:
    if use_reference() or surrounded():
        return reference.fly_hash(input, index)
    if torch.compiler.is_compiling():
        return cast(Tensor, registered("fly_hash", input, index))
    return NODES["fly_hash"](input, index)


def _fly_readout(
    input: Tensor, index: Tensor, gain: Tensor, readout: Tensor, task: Tensor | None
) -> Tensor:
    if use_reference() or surrounded():
        return reference.fly_readout(input, index, gain, readout, task)
    if torch.compiler.is_compiling():
        return cast(Tensor, registered("fly_readout", input, index, gain, readout, task))
    return NODES["fly_readout"](input, index, gain, readout, task)


def fly_hash(input: Tensor, index: Tensor) -> Tensor:
    r"""Hash as the fly's olfactory circuit does: many units, each the sum of a few inputs.

    .. math:: h_b = \mathrm{relu}(m_b - \overline{m_b}), \qquad m_{bj} = \sum_k x_{b,\,i_{jk}}

    The mean is over the units. An input may occur in a unit more than once.

    Args:
        input: x, [B, I]: float64, float32, bfloat16 or float16.
        index: i, [H, n], int32 or int64, in [0, I): the inputs of each unit.

    Returns:
        h, [B, H], of the dtype of ``input`` (of autocast, where that is on).

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit; an index out of range. On CUDA, where looking
            would wait for the device, that makes the results NaN instead; under transforms plain
            PyTorch reports it in its own way.

    Source: the first layer of FlyNet, Hong and Pavlic, after Dasgupta, Stevens and Navlakha (2017).
    """
    _checks.tensors("fly_hash", input=input, index=index)
    if _checks.autocast_enabled(input.device):
        (input,) = low_precision(input.device, input)
        with torch.autocast(input.device.type, enabled=False):
            return _fly_hash(input, index)
    return _fly_hash(input, index)


def fly_readout(
    input: Tensor, index: Tensor, gain: Tensor, readout: Tensor, task: Tensor | None = None
) -> Tensor:
    r"""Read a modulated fly hash out, which is never written to memory.

    .. math:: y_b = R\,(v_{t(b)} \odot h_b), \qquad h = \text{fly\_hash}(x)

    The gradients recompute h, too. A sample's result does not depend on the others of its batch,
    nor on their tasks, to the bit.

    Args:
        input: x, [B, I]: float64, float32, bfloat16 or float16.
        index: i, [H, n], int32 or int64, in [0, I): the inputs of each unit.
        gain: v, [H], or [T, H] with ``task``; of the dtype of ``input``.
        readout: R, [O, H], of the dtype of ``input``.
        task: t, [B], int64, in [0, T): the row of ``gain`` that each sample takes.

    Returns:
        y, [B, O], of the dtype of ``input`` (of autocast, where that is on).

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit; an index or a task out of range (as for
            :func:`fly_hash`).

    Source: FlyNet, Hong and Pavlic; see "Task-specific geometric sensitive hashing", eq. 2.
    """
    op = "fly_readout"
    _checks.tensors(op, input=input, index=index, gain=gain, readout=readout)
    if task is not None:
        _checks.tensors(op, task=task)
    if _checks.autocast_enabled(input.device):
        input, gain, readout = low_precision(input.device, input, gain, readout)
        with torch.autocast(input.device.type, enabled=False):
            return _fly_readout(input, index, gain, readout, task)
    return _fly_readout(input, index, gain, readout, task)


def gain_linear(
    input: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    task: Tensor | None = None,
) -> Tensor:
    r"""Apply one linear map to inputs that are scaled, sample by sample or all alike.

    .. math:: y_b = W\,(v_{t(b)} \odot x_b) + \beta

    It is ``torch.nn.functional.linear`` of the scaled input; a gain that all samples share scales
    the weight instead, where that is smaller. No kernel of our own could gain more than the time
    of the scaling, B I operations beside the product's B I O.

    Args:
        input: x, [B, ..., I]; any shape [..., I] without ``task``.
        gain: v, [I], or [T, I] with ``task``; of the dtype of ``input``.
        weight: W, [O, I], likewise.
        bias: β, [O], likewise, or None.
        task: t, [B], int64, in [0, T): the row of ``gain`` that each sample takes;
            ``torch.arange(B)`` for a gain for each sample.

    Returns:
        y, [B, ..., O], of the dtype of ``input`` (of autocast, where that is on).

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.
        IndexError: a task out of range.
    """
    op = "gain_linear"
    _checks.tensors(op, input=input, gain=gain, weight=weight)
    for name, t in (("bias", bias), ("task", task)):
        if t is not None:
            _checks.tensors(op, **{name: t})
    if _checks.autocast_enabled(input.device):
        input, gain, weight, bias = low_precision(input.device, input, gain, weight, bias)
    _fly_checks.gain_linear(input, gain, weight, bias, task)
    if task is not None:
        scale = gain.index_select(0, task)
        input = input * scale.reshape(scale.shape[0], *[1] * (input.dim() - 2), scale.shape[-1])
    elif size_left_open(input.numel()) or input.numel() <= weight.numel():
        input = input * gain
    else:
        weight = weight * gain
    return F.linear(input, weight, bias)


differentiable("fly_hash", (0,), _hash_vjp)
differentiable("fly_readout", (0, 2, 3), _readout_vjp)
