"""The fly-hash ops in plain PyTorch, differentiable to any order: part of the reference.

The gradients are written out, so that they can be differentiated in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from neuromod_ext import _fly_checks
from neuromod_ext._checks import accumulation_dtype


def _projected(input: Tensor, index: Tensor) -> Tensor:
    """Each unit's inputs, summed, less the mean over the units: [..., I] to [..., H]."""
    units = input.new_zeros(*input.shape[:-1], index.shape[0])
    for column in index.unbind(-1):
        units = units + input.index_select(-1, column)
    return units - units.mean(-1, keepdim=True)


def _spread(grad: Tensor, index: Tensor, inputs: int) -> Tensor:
    """The transpose of :func:`_projected`: [..., H] to [..., I]."""
    grad = grad - grad.mean(-1, keepdim=True)
    out = grad.new_zeros(*grad.shape[:-1], inputs)
    for column in index.unbind(-1):
        out = out.index_add(-1, column, grad)
    return out


def fly_hash(input: Tensor, index: Tensor) -> Tensor:
    """H = relu(m - mean(m)), m[b,j] = Σ_k x[b, index[j,k]]."""
    _fly_checks.fly_hash(input, index)
    wide = input.to(accumulation_dtype(input.dtype))
    return _projected(wide, index).relu().to(input.dtype)


def fly_hash_backward(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """The gradient of :func:`fly_hash`'s input."""
    _fly_checks.fly_hash_backward(grad_output, input, index)
    wide = accumulation_dtype(input.dtype)
    inactive = _projected(input.to(wide), index).relu() <= 0
    grad = grad_output.to(wide).masked_fill(inactive, 0)
    return _spread(grad, index, input.shape[-1]).to(input.dtype)


def fly_readout(
    input: Tensor, index: Tensor, gain: Tensor, readout: Tensor, task: Tensor | None = None
) -> Tensor:
    """y[b,o] = Σ_j R[o,j] v[t(b),j] h[b,j], h = fly_hash(x)."""
    _fly_checks.fly_readout(input, index, gain, readout, task)
    wide = accumulation_dtype(input.dtype)
    hidden = _projected(input.to(wide), index).relu()
    return ((hidden * _of_samples(gain.to(wide), task)) @ readout.to(wide).mT).to(input.dtype)


def _of_samples(gain: Tensor, task: Tensor | None) -> Tensor:
    return gain if task is None else gain.index_select(0, task)


def fly_readout_backward(
    grad_output: Tensor,
    input: Tensor,
    index: Tensor,
    gain: Tensor,
    readout: Tensor,
    task: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`fly_readout`; of one that is not needed, an empty tensor."""
    _fly_checks.fly_readout_backward(grad_output, input, index, gain, readout, task)
    wide = accumulation_dtype(input.dtype)
    grad, x, v, R = (t.to(wide) for t in (grad_output, input, gain, readout))
    hidden, each = _projected(x, index).relu(), _of_samples(v, task)
    signal = grad @ R
    grad_input = grad_gain = grad_readout = grad.new_empty(0)
    if needed[0]:
        active = (signal * each).masked_fill(hidden <= 0, 0)
        grad_input = _spread(active, index, input.shape[-1])
    if needed[1]:
        products = hidden * signal
        grad_gain = (
            products.sum(0) if task is None else v.new_zeros(v.shape).index_add(0, task, products)
        )
    if needed[2]:
        grad_readout = grad.mT @ (hidden * each)
    dtype = input.dtype
    return grad_input.to(dtype), grad_gain.to(dtype), grad_readout.to(dtype)
