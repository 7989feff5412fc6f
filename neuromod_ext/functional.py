"""Functions on basis points and coefficients, in the manner of ``torch.nn.functional``.

Notation: B samples, K basis points, O outputs, I inputs; P the basis points, c the coefficients of
each sample's condition, W(s) = Σ_k c_k(s) P_k the weight a condition selects. All functions are
differentiable to any order (unless they say otherwise), and work under ``torch.compile``,
``vmap``, ``jvp`` and autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext import _checks, autograd
from neuromod_ext._ops import OPS
from neuromod_ext._transforms import size_left_open, transform_active
from neuromod_ext.reference import MANIFOLD_LINEAR

__all__ = [
    "interpolate_weights",
    "manifold_conv1d",
    "manifold_conv2d",
    "manifold_conv3d",
    "manifold_linear",
    "manifold_metric",
    "manifold_step_",
    "natural_gradient",
]


def _autocast(*operands: Tensor | None) -> tuple[Any, ...]:
    """What autocast asks for: a context in which it is off, then the operands in its dtype."""
    device = next(t.device for t in operands if t is not None)
    if not _checks.autocast_enabled(device):
        return (nullcontext(), *operands)
    dtype = torch.get_autocast_dtype(device.type)
    low = (torch.float32, torch.float16, torch.bfloat16)
    cast = (t.to(dtype) if t is not None and t.dtype in low else t for t in operands)
    return (torch.autocast(device.type, enabled=False), *cast)


def manifold_linear(
    input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None
) -> Tensor:
    r"""Apply a linear map whose weight is chosen, sample by sample, on a weight manifold.

    .. math:: y_{b} = \sum_k c_{bk} (P_k x_b + \beta_k)

    No per-sample weight is ever stored. Dimensions of ``input`` between the first and the last
    (tokens) share their sample's condition. One condition for the whole batch is folded into one
    weight first, and then costs what ``torch.nn.functional.linear`` costs.

    Args:
        input: x, [B, ..., I]; any shape [..., I] if ``coeff`` is one condition.
        basis: P, [K, O, I], of the dtype of ``input``: float64, float32, bfloat16 or float16.
        coeff: c, [B, K], or [1, K] or [K] for one condition; float64 for float64 operands, else
            float32.
        bias: β, [K, O], or None.

    Returns:
        y, [B, ..., O], of the dtype of ``input`` (of autocast, where that is on).

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.

    Source: the basis-point decomposition of Benjamin et al., "Walking the Weight Manifold".
    """
    _checks.tensors("manifold_linear", input=input, basis=basis, coeff=coeff)
    context, input, basis, bias = _autocast(input, basis, bias)
    with context:
        one_condition = coeff.dim() == 1 or (coeff.dim() == 2 and coeff.shape[0] == 1)
        if not one_condition or input.dim() == 0:
            return autograd.manifold_linear(input, basis, coeff, bias)
        condition = coeff.reshape(1, -1)
        rows = input.unsqueeze(0)
        if input.dim() == 1:
            return autograd.manifold_linear(rows, basis, condition, bias).squeeze(0)
        _checks.manifold_linear(rows, basis, condition, bias)
        weight = autograd.interpolate_weights(basis, condition).squeeze(0)
        if bias is not None:
            bias = autograd.interpolate_weights(bias, condition).squeeze(0)
        return F.linear(input, weight, bias)


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


def interpolate_weights(basis: Tensor, coeff: Tensor) -> Tensor:
    r"""Weights from basis points, one for each condition.

    .. math:: W_b = \sum_k c_{bk} P_k

    Args:
        basis: P, [K, ...].
        coeff: c, [B, K], or [K] for one weight; float64 for float64 basis points, else float32.

    Returns:
        W, [B, ...], or [...] for ``coeff`` [K]; of the dtype of ``basis``.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.
    """
    _checks.tensors("interpolate_weights", basis=basis, coeff=coeff)
    if coeff.dim() == 1:
        return autograd.interpolate_weights(basis, coeff.unsqueeze(0)).squeeze(0)
    return autograd.interpolate_weights(basis, coeff)


def manifold_metric(coeff: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""The integrated metric of a manifold: the Gram matrix of its coefficients.

    .. math:: G = \sum_n w_n\, c_n c_n^\top \approx \int \rho(s)\, c(s)\, c(s)^\top ds

    Moving the basis points by ΔP moves the whole manifold by Σ_jk G_jk ⟨ΔP_j, ΔP_k⟩. Sums run in
    float64.

    Args:
        coeff: c, [N, K], float32 or float64: conditions seen, or nodes of a quadrature rule.
        weight: w, [N], used as given (quadrature weights, importance); 1/N if None.

    Returns:
        G, [K, K], of the dtype of ``coeff``.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit; no condition and no weight.

    Source: the metric M(s) of Benjamin et al., "Walking the Weight Manifold", integrated.
    """
    _checks.tensors("manifold_metric", coeff=coeff)
    with _autocast(coeff)[0]:
        return autograd.manifold_metric(coeff, weight)


def natural_gradient(
    input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> Tensor:
    r"""The gradient of a manifold linear layer's basis points in the metric of the manifold.

    .. math:: \tilde g_j = \sum_k G^{-1}_{jk} \sum_b c_{bk}\, g_b x_b^\top
              = \sum_b (G^{-1} c_b)_j\, g_b x_b^\top

    By the second form it is the ordinary gradient fed with the dual coefficients G⁻¹c, and costs
    no more.

    Args:
        input: x, [B, ..., I].
        grad_output: g, the loss's gradient with respect to the layer's output, [B, ..., O].
        coeff: c, [B, K]; float64 for float64 operands, else float32.
        metric_inverse: G⁻¹, [K, K], symmetric, of the dtype of ``coeff``.

    Returns:
        g̃, [K, O, I], of the dtype of ``input``; a steepest-descent step is −lr g̃.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.

    Source: the update of Benjamin et al., "Walking the Weight Manifold"; the dual form is ours.
    """
    op = "natural_gradient"
    _checks.tensors(
        op, input=input, grad_output=grad_output, coeff=coeff, metric_inverse=metric_inverse
    )
    _checks.natural_gradient(coeff, metric_inverse)
    context, input, grad_output = _autocast(input, grad_output)
    with context:
        dual = torch.matmul(coeff, metric_inverse.mT)
        return autograd.contract(MANIFOLD_LINEAR, "basis", grad_output, input, dual)


@torch.no_grad()
def manifold_step_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    metric_inverse: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
) -> Tensor:
    r"""One step of gradient descent in the metric of the manifold, in place, in one pass.

    .. math::
        d &= G^{-1} g + \lambda P \\
        m &\leftarrow \mu m + (1 - \tau) d \quad (m = d \text{ in the first step}) \\
        P &\leftarrow P - \eta\, (d + \mu m \text{ if nesterov else } m)

    This is ``torch.optim.SGD`` on the coordinates Q of P = G^{-1/2} Q, in which the metric is the
    identity; weight decay is that of Q. Not differentiable.

    Args:
        param: P, [K, ...], changed in place.
        grad: g, the gradient of the loss with respect to ``param``.
        momentum_buffer: m, like ``param``, changed in place; needed if ``momentum`` is not 0.
        metric_inverse: G⁻¹, [K, K], symmetric, float64 for a float64 ``param``, else float32; the
            identity if None.
        lr: η, the learning rate, 1/(2λ) in the paper's terms.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: use Nesterov's momentum.
        maximize: ascend instead.
        first_step: the buffer holds nothing yet.

    Returns:
        ``param``.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit, a number is not finite, or memory that is
            written overlaps another argument.
        NotImplementedError: under a ``torch.func`` transform.

    Source: ΔP = −(1/2λ) [∫M ds]⁻¹ ∫g ds of Benjamin et al., "Walking the Weight Manifold".
    """
    _checks.tensors("manifold_step_", param=param, grad=grad)
    if transform_active():
        raise NotImplementedError(
            "manifold_step_: expected no torch.func transform around it, got one; it works in "
            "place and is not differentiable"
        )
    OPS["manifold_step_"](
        param,
        grad,
        momentum_buffer,
        metric_inverse,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first_step=first_step,
    )
    return param
