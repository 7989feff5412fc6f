"""Convolutions whose kernel lies on a weight manifold; public in :mod:`neuromod_ext.functional`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext import _checks, _conv_autograd, _conv_checks, autograd
from neuromod_ext._contraction import use_reference
from neuromod_ext._conv_checks import Options
from neuromod_ext._transforms import low_precision, size_left_open, surrounded

# How a convolution is gone about: "windows" is the op; the others are torch's own.
PLANS = ("windows", "grouped", "stacked")
FORCED = os.environ.get("NEUROMOD_CONV_PLAN")


def plan(input: Tensor, basis: Tensor, options: Options) -> str:
    """The plan for samples of several conditions, from device and shapes."""
    if FORCED:
        if FORCED not in PLANS:
            raise ValueError(
                "manifold_conv: expected NEUROMOD_CONV_PLAN to be windows, grouped or stacked, "
                f"got {FORCED}; unset it"
            )
        return FORCED
    on_cpu = input.device.type == "cpu"
    if not (on_cpu or input.device.type == "cuda"):
        return "grouped"
    space = options.output_space(input.shape[2:], basis.shape[3:])
    pixels = math.prod(space)
    if _few_pixels(pixels, basis) if on_cpu else _few_pixels_on_cuda(pixels, basis):
        return "stacked"
    depthwise = basis.shape[1] == options.groups == input.shape[1]  # products without depth
    return "grouped" if depthwise or (on_cpu and len(space) == 3) else "windows"


def _few_pixels(pixels: int, basis: Tensor) -> bool:
    """Whether a sample's pixels do not pay for the blend of its kernel; measured."""
    return 2000 * pixels**2 <= math.prod(basis.shape[1:])


def _few_pixels_on_cuda(pixels: int, basis: Tensor) -> bool:
    """The same, predicted and not measured.

    A tile of pixels costs its rows and, for each basis point, as much as 96 rows to fetch and blend
    it. Plan stacked multiplies all pixels K times and mixes the results at the memory's speed, as
    if the depth were 1400 deeper.
    """
    K, depth = basis.shape[0], math.prod(basis.shape[2:])
    tile = 64 if pixels <= 64 else 128 if pixels <= 128 else 256
    return -(-pixels // tile) * (tile + 96 * K) * depth > pixels * K * (depth + 1400)


def _manifold_conv(
    dims: int,
    convolve: Callable[..., Tensor],
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    op = f"manifold_conv{dims}d"
    _checks.tensors(op, input=input, basis=basis, coeff=coeff)
    if bias is not None:
        _checks.tensors(op, bias=bias)
    if _checks.autocast_enabled(input.device):
        input, basis, bias = low_precision(input.device, input, basis, bias)
        with torch.autocast(input.device.type, enabled=False):
            return _manifold_conv(
                dims, convolve, input, basis, coeff, bias, stride, padding, dilation, groups
            )
    _conv_checks.function(op, dims, input, basis, coeff, bias, groups)
    options, far = _conv_checks.walk(op, input, basis, stride, padding, dilation, groups)
    if any(far):
        input = F.pad(input, [n for far_side in reversed(far) for n in (0, far_side)])
    return _walk(convolve, input, basis, coeff.reshape(-1, coeff.shape[-1]), bias, options)


def _walk(
    convolve: Callable[..., Tensor],
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    samples = coeff.shape[0]
    has_op = not use_reference() and input.device.type in ("cpu", "cuda")
    if size_left_open(samples):  # a number of groups left open is beyond torch's compilers
        if has_op:
            return _conv_autograd.manifold_conv(input, basis, coeff, bias, options)
        return _stacked(convolve, input, basis, coeff, bias, options)
    if samples == 1:
        weight = autograd.interpolate_weights(basis, coeff).squeeze(0)
        if bias is not None:
            bias = autograd.interpolate_weights(bias, coeff).squeeze(0)
        return convolve(input, weight, bias, *options)
    if samples == 0:  # no group, which torch's convolution refuses
        return _stacked(convolve, input, basis, coeff, bias, options)
    chosen = plan(input, basis, options)
    if chosen == "windows" and has_op and not surrounded():
        return _conv_autograd.manifold_conv(input, basis, coeff, bias, options)
    if chosen == "stacked":
        return _stacked(convolve, input, basis, coeff, bias, options)
    return _grouped(convolve, input, basis, coeff, bias, options)


def _grouped(
    convolve: Callable[..., Tensor],
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """A kernel for each sample, and one convolution with a group for each."""
    samples, (stride, padding, dilation, groups) = coeff.shape[0], options
    weight = autograd.interpolate_weights(basis, coeff)
    if bias is not None:
        bias = autograd.interpolate_weights(bias, coeff).flatten()
    rows, groups = input.flatten(0, 1).unsqueeze(0), samples * groups
    out = convolve(rows, weight.flatten(0, 1), bias, stride, padding, dilation, groups)
    return out.reshape(samples, -1, *out.shape[2:])


def _stacked(
    convolve: Callable[..., Tensor],
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """All basis points' convolutions in one, then their mixture: K times the work."""
    num_basis, out_channels = basis.shape[:2]
    grouped = basis.unflatten(1, (options.groups, -1)).transpose(
        0, 1
    )  # [groups, K, O / groups, ...]
    out = convolve(input, grouped.flatten(0, 2), None, *options)
    space = out.dim() - 2
    out = out.unflatten(1, (options.groups, num_basis, -1)).to(coeff.dtype)
    mixed = (out * coeff.reshape(-1, 1, num_basis, *[1] * (space + 1))).sum(2).flatten(1, 2)
    if bias is not None:
        blend = torch.matmul(coeff, bias.to(coeff.dtype))
        mixed = mixed + blend.reshape(-1, out_channels, *[1] * space)
    result: Tensor = mixed.to(input.dtype)
    return result


def manifold_conv1d(
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolve over one dimension with a kernel chosen, sample by sample, on a weight manifold.

    As :func:`manifold_conv2d`, with ``input`` [B, C, L] and ``basis`` [K, O, C / groups, kL].
    """
    return _manifold_conv(1, F.conv1d, input, basis, coeff, bias, stride, padding, dilation, groups)


def manifold_conv2d(
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolve over two dimensions with a kernel chosen, sample by sample, on a weight manifold.

    .. math:: y_b = \Big(\sum_k c_{bk} P_k\Big) * x_b + \sum_k c_{bk} \beta_k

    Each sample's kernel is blended, rounded to the dtype, in cache or shared memory and applied
    there; where a sample has few pixels, all K convolutions are mixed. Depthwise convolutions, on
    the CPU those of three dimensions too, and any other device take one convolution with a group
    for each sample and stored kernels. One condition for the whole batch is one plain convolution.

    Args:
        input: x, [B, C, H, W]; [C, H, W] too if ``coeff`` is one condition.
        basis: P, [K, O, C / groups, kH, kW].
        coeff: c, [B, K], or [1, K] or [K] for one condition; float64 for float64 operands, else
            float32.
        bias: β, [K, O], or None.
        stride: as in ``torch.nn.functional.conv2d``.
        padding: likewise, 'same' and 'valid' included.
        dilation: likewise.
        groups: likewise.

    Returns:
        y, [B, O, H', W'].

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.

    Source: Benjamin et al., "Walking the Weight Manifold".
    """
    return _manifold_conv(2, F.conv2d, input, basis, coeff, bias, stride, padding, dilation, groups)


def manifold_conv3d(
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolve over three dimensions with a kernel chosen, sample by sample, on a weight manifold.

    As :func:`manifold_conv2d`, with ``input`` [B, C, D, H, W] and ``basis``
    [K, O, C / groups, kD, kH, kW].
    """
    return _manifold_conv(3, F.conv3d, input, basis, coeff, bias, stride, padding, dilation, groups)
