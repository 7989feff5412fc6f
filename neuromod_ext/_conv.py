"""Convolutions whose kernel lies on a weight manifold; public in :mod:`neuromod_ext.functional`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext import _checks, autograd
from neuromod_ext._transforms import size_left_open


def _manifold_conv(
    dims: int,
    convolve: Callable[..., Tensor],
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    groups: int,
    **options: Any,
) -> Tensor:
    op = f"manifold_conv{dims}d"
    _checks.tensors(op, input=input, basis=basis, coeff=coeff)
    _checks.manifold_conv(op, dims, input, basis, coeff, bias, groups)
    condition = coeff.reshape(-1, coeff.shape[-1])
    if condition.shape[0] == 0:  # no sample: any one kernel, for an output of the right shape
        condition = condition.sum(0, keepdim=True)
    samples = condition.shape[0]
    if size_left_open(samples):  # a number of groups left open is beyond torch's compilers
        return _stacked_conv(convolve, input, basis, condition, bias, groups, **options)
    weight = autograd.interpolate_weights(basis, condition)
    if bias is not None:
        bias = autograd.interpolate_weights(bias, condition)
    if samples == 1:
        weight, bias = weight.squeeze(0), None if bias is None else bias.squeeze(0)
        return convolve(input, weight, bias, groups=groups, **options)
    out = convolve(
        input.flatten(0, 1).unsqueeze(0),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        groups=samples * groups,
        **options,
    )
    return out.reshape(samples, -1, *out.shape[2:])


def _stacked_conv(
    convolve: Callable[..., Tensor],
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    groups: int,
    **options: Any,
) -> Tensor:
    """All basis points' convolutions in one, then their mixture: K times the work."""
    num_basis, out_channels = basis.shape[:2]
    grouped = basis.unflatten(1, (groups, -1)).transpose(0, 1)  # [groups, K, O / groups, ...]
    out = convolve(input, grouped.flatten(0, 2), None, groups=groups, **options)
    space = out.dim() - 2
    out = out.unflatten(1, (groups, num_basis, -1)).to(coeff.dtype)
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
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return _manifold_conv(1, F.conv1d, input, basis, coeff, bias, groups, **options)


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

    Each sample's kernel is folded from the basis points, and one grouped convolution applies them
    all; one condition for the whole batch is one plain convolution. Compiled code that leaves the
    batch size open runs all K convolutions instead, and mixes them.

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
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return _manifold_conv(2, F.conv2d, input, basis, coeff, bias, groups, **options)


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
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return _manifold_conv(3, F.conv3d, input, basis, coeff, bias, groups, **options)
