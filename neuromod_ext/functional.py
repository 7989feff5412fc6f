"""Functions on basis points and coefficients, in the manner of ``torch.nn.functional``.

Notation: B samples, K basis points, O outputs, I inputs; P the basis points, c the coefficients of
each sample's condition, W(s) = Σ_k c_k(s) P_k the weight a condition selects. All functions are
differentiable to any order (unless they say otherwise), and work under ``torch.compile``,
``vmap``, ``jvp`` and autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext import _checks, autograd
from neuromod_ext._contraction import contract
from neuromod_ext._conv import manifold_conv1d, manifold_conv2d, manifold_conv3d
from neuromod_ext._fly import fly_hash, fly_readout, gain_linear
from neuromod_ext._hadamard import hadamard_rotate, hadamard_rotate_
from neuromod_ext._ops import EXTENSION, OPS, TORCH_PRODUCT_OUTRUNS_TILES
from neuromod_ext._transforms import (
    low_precision,
    refuse_transforms,
    size_left_open,
    transform_active,
)
from neuromod_ext.reference import MANIFOLD_LINEAR

__all__ = [
    "fly_hash",
    "fly_readout",
    "gain_linear",
    "hadamard_rotate",
    "hadamard_rotate_",
    "interpolate_weights",
    "manifold_conv1d",
    "manifold_conv2d",
    "manifold_conv3d",
    "manifold_linear",
    "manifold_linear_local",
    "manifold_metric",
    "manifold_step_",
    "manifold_step_foreach_",
    "natural_gradient",
    "natural_step_",
]

_FEW_ROWS = 16  # with more, storing the weight costs little beside the products of both passes


def manifold_linear(
    input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None
) -> Tensor:
    r"""Apply a linear map whose weight is chosen, sample by sample, on a weight manifold.

    .. math:: y_{b} = \sum_k c_{bk} (P_k x_b + \beta_k)

    The weights of a batch are never stored. (On CUDA, for cuBLAS, those of a few samples may be:
    32 MiB at most, or one. So may the basis points' products: 128 MiB at most.)

    Dimensions of ``input`` between the first and the last (tokens) share their sample's condition.
    One condition for the whole batch is folded into one weight, and then costs what
    ``torch.nn.functional.linear`` costs, or less.

    The order of the sums depends on the shapes: many tokens a sample have its weight blended,
    rounded to the dtype, first. A NaN or an infinity among the operands makes every
    result it enters NaN or infinite in any order; which of the two may differ.

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
    if bias is not None:
        _checks.tensors("manifold_linear", bias=bias)
    if _checks.autocast_enabled(input.device):
        input, basis, bias = low_precision(input.device, input, basis, bias)
        with torch.autocast(input.device.type, enabled=False):
            return _manifold_linear(input, basis, coeff, bias)
    return _manifold_linear(input, basis, coeff, bias)


def _manifold_linear(input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None) -> Tensor:
    one_condition = coeff.dim() == 1 or (coeff.dim() == 2 and coeff.shape[0] == 1)
    if not one_condition or input.dim() == 0 or _one_row(input, coeff):
        return autograd.manifold_linear(input, basis, coeff, bias)
    rows, condition = input.unsqueeze(0), coeff.reshape(1, -1)
    if input.dim() == 1 or _folds_in_cache(input):
        return autograd.manifold_linear(rows, basis, condition, bias).squeeze(0)
    _checks.manifold_linear(rows, basis, condition, bias)
    weight = autograd.interpolate_weights(basis, condition).squeeze(0)
    if bias is not None:
        bias = autograd.interpolate_weights(bias, condition).squeeze(0)
    return F.linear(input, weight, bias)


def _one_row(input: Tensor, coeff: Tensor) -> bool:
    """Whether a call of one condition is of one sample without tokens, which the op takes as is."""
    return coeff.dim() == 2 and input.dim() == 2 and input.shape[0] == 1 and _folds_in_cache(input)


def _folds_in_cache(input: Tensor) -> bool:
    """Whether the op folds one condition's weight faster than F.linear takes a stored one."""
    if not EXTENSION or input.device.type != "cpu" or transform_active():
        return False
    if input.dtype in (torch.float32, torch.float64) and not TORCH_PRODUCT_OUTRUNS_TILES:
        return True
    return not size_left_open(input.numel()) and input.numel() <= _FEW_ROWS * input.shape[-1]


def manifold_linear_local(
    input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor, bias: Tensor | None = None
) -> Tensor:
    r"""Apply :func:`manifold_linear` with few non-zero coefficients, of consecutive basis points.

    .. math:: y_b = \sum_{l < L} c_{bl} (P_k x_b + \beta_k), \qquad k = (i_b + l) \bmod K

    It costs L of the K basis points; ``topology.local(s)`` yields index and coefficients of a
    curve on which few basis points act at a time. Other basis points do not enter a sample's
    result, even where they are not finite. Under a ``torch.func`` transform, and where no kernel
    is built, the other coefficients are filled up with zeros instead.

    Args:
        input: x, [B, ..., I].
        basis: P, [K, O, I], of the dtype of ``input``: float64, float32, bfloat16 or float16.
        index: i, [B], int64: the basis point of each sample's first coefficient, modulo K.
        coeff: c, [B, L], 1 <= L <= K; float64 for float64 operands, else float32.
        bias: β, [K, O], or None.

    Returns:
        y, [B, ..., O], of the dtype of ``input`` (of autocast, where that is on).

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.
    """
    op = "manifold_linear_local"
    _checks.tensors(op, input=input, basis=basis, index=index, coeff=coeff)
    if bias is not None:
        _checks.tensors(op, bias=bias)
    if _checks.autocast_enabled(input.device):
        input, basis, bias = low_precision(input.device, input, basis, bias)
        with torch.autocast(input.device.type, enabled=False):
            return autograd.manifold_linear(input, basis, coeff, bias, index)
    return autograd.manifold_linear(input, basis, coeff, bias, index)


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
    if weight is not None:
        _checks.tensors("manifold_metric", weight=weight)
    if _checks.autocast_enabled(coeff.device):
        with torch.autocast(coeff.device.type, enabled=False):
            return autograd.manifold_metric(coeff, weight)
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
    if _checks.autocast_enabled(input.device):
        input, grad_output = low_precision(input.device, input, grad_output)
        with torch.autocast(input.device.type, enabled=False):
            return _natural_gradient(input, grad_output, coeff, metric_inverse)
    return _natural_gradient(input, grad_output, coeff, metric_inverse)


def _natural_gradient(
    input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> Tensor:
    _checks.natural_gradient(input, grad_output, coeff, metric_inverse)
    dual = torch.matmul(coeff, metric_inverse.mT)
    return contract(MANIFOLD_LINEAR, "basis", grad_output, input, dual)


@torch.no_grad()
def natural_step_(
    basis: Tensor,
    input: Tensor,
    grad_output: Tensor,
    coeff: Tensor,
    metric_inverse: Tensor,
    lr: float,
) -> Tensor:
    r"""Move a manifold linear layer's basis points against their :func:`natural_gradient`.

    .. math:: P_j \leftarrow P_j - \eta \sum_b (G^{-1} c_b)_j\, g_b x_b^\top

    In place and in one pass: the gradient is never stored. Not differentiable.

    Args:
        basis: P, [K, O, I], changed in place.
        input: x, [B, ..., I], of the dtype of ``basis``.
        grad_output: g, the loss's gradient with respect to the layer's output, [B, ..., O],
            likewise.
        coeff: c, [B, K]; float64 for float64 operands, else float32.
        metric_inverse: G⁻¹, [K, K], symmetric, of the dtype of ``coeff``.
        lr: η, the learning rate, 1/(2λ) in the paper's terms.

    Returns:
        ``basis``.

    Raises:
        TypeError: a dtype does not fit (under autocast, that of ``basis`` is autocast's), or an
            argument is no tensor.
        ValueError: a shape or device does not fit, ``lr`` is not finite, or ``basis`` overlaps
            another argument.
        NotImplementedError: under a ``torch.func`` transform.

    Source: the update of Benjamin et al., "Walking the Weight Manifold"; the dual form is ours.
    """
    op = "natural_step_"
    _checks.tensors(
        op,
        basis=basis,
        input=input,
        grad_output=grad_output,
        coeff=coeff,
        metric_inverse=metric_inverse,
    )
    refuse_transforms(op)
    if _checks.autocast_enabled(input.device):
        input, grad_output = low_precision(input.device, input, grad_output)
        with torch.autocast(input.device.type, enabled=False):
            return natural_step_(basis, input, grad_output, coeff, metric_inverse, lr)
    _checks.natural_step_(basis, input, grad_output, coeff, metric_inverse, lr)
    dual = torch.matmul(coeff, metric_inverse.mT) * -lr
    OPS["manifold_linear_update_"](basis, grad_output, input, dual)
    return basis


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
    for name, t in (("momentum_buffer", momentum_buffer), ("metric_inverse", metric_inverse)):
        if t is not None:
            _checks.tensors("manifold_step_", **{name: t})
    refuse_transforms("manifold_step_")
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


@torch.no_grad()
def manifold_step_foreach_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    metric_inverses: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
) -> None:
    """:func:`manifold_step_` of many parameters of one dtype and device at once, in place.

    On CUDA one kernel steps two dozen of them, and reads a rate that is a tensor there when it
    runs: a captured graph takes the rate of the day. Not differentiable.

    Args:
        params: P of each, [K, ...], changed in place.
        grads: g of each.
        momentum_buffers: m of each, changed in place; none without momentum.
        metric_inverses: G⁻¹ of each, or None; None for all if not given.
        lr: η, a number or a tensor of one element, on the device of ``params`` or the CPU.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: use Nesterov's momentum.
        maximize: ascend instead.
        first_step: the buffers hold nothing yet.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a number of tensors, a shape or a device does not fit, a number is not finite,
            or memory that is written overlaps another argument.
        NotImplementedError: under a ``torch.func`` transform.
    """
    op = "manifold_step_foreach_"
    given = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers}
    for name, sequence in given.items():
        _checks.tensors(op, **{f"{name}[{i}]": t for i, t in enumerate(sequence)})
    refuse_transforms(op)
    if metric_inverses is None:
        metric_inverses = [None] * len(params)
    inverses = {f"metric_inverses[{i}]": t for i, t in enumerate(metric_inverses)}
    _checks.tensors(op, **{name: t for name, t in inverses.items() if t is not None})
    rate = torch.as_tensor(lr, dtype=torch.float64)
    if rate.numel() != 1:
        raise ValueError(f"{op}: expected lr of one element, got shape {list(rate.shape)}")
    rate = rate.reshape(())
    OPS[op](
        list(params),
        list(grads),
        list(momentum_buffers),
        list(metric_inverses),
        rate,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first_step=first_step,
    )
