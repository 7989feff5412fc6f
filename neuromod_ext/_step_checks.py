"""The errors of the optimizers' step, in Python; see :mod:`neuromod_ext._checks`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from neuromod_ext._checks import _accumulation_like, _floating, _like, _name, _rank, _same_shape


def manifold_step_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    metric_inverse: Tensor | None,
    **numbers: float,
) -> None:
    op = "manifold_step_"
    _step_operands(op, "", param, grad, momentum_buffer, metric_inverse, numbers["momentum"])
    _finite(op, numbers)


def manifold_step_foreach_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    metric_inverses: Sequence[Tensor | None],
    lr: Tensor,
    **numbers: float,
) -> None:
    op = "manifold_step_foreach_"
    _as_many(op, "grads", grads, params)
    if len(momentum_buffers) > 0:
        _as_many(op, "momentum_buffers", momentum_buffers, params)
    _as_many(op, "metric_inverses", metric_inverses, params)
    if lr.dtype != torch.float64:
        raise TypeError(
            f"{op}: expected lr of dtype float64, got {_name(lr.dtype)}; convert it with .double()"
        )
    _same_shape(op, "lr", lr, "[]", [])
    for i, (param, grad, inverse) in enumerate(zip(params, grads, metric_inverses, strict=True)):
        if i > 0:
            _like(op, f"params[{i}]", param, "params[0]", params[0])
        buffer = momentum_buffers[i] if len(momentum_buffers) > 0 else None
        _step_operands(op, f"s[{i}]", param, grad, buffer, inverse, numbers["momentum"])
    if len(params) > 0 and lr.device.type != "cpu" and lr.device != params[0].device:
        raise ValueError(
            f"{op}: expected lr on {params[0].device} or on cpu, got {lr.device}; move it"
        )
    _finite(op, numbers)


def _as_many(op: str, name: str, given: Sequence[object], params: Sequence[Tensor]) -> None:
    if len(given) != len(params):
        raise ValueError(
            f"{op}: expected as many {name} as params = {len(params)}, got {len(given)}"
        )


def _step_operands(
    op: str,
    suffix: str,
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    metric_inverse: Tensor | None,
    momentum: float,
) -> None:
    """``suffix`` ends the arguments' names."""
    names = ("param", "grad", "momentum_buffer", "metric_inverse")
    of_param, of_grad, of_buffer, of_metric = (name + suffix for name in names)
    _floating(op, of_param, param)
    _rank(op, of_param, param, 1, "[K, ...]", exact=False)
    _like(op, of_grad, grad, of_param, param)
    _same_shape(op, of_grad, grad, "[K, ...]", param.shape)
    if momentum_buffer is not None:
        _like(op, of_buffer, momentum_buffer, of_param, param)
        _same_shape(op, of_buffer, momentum_buffer, "[K, ...]", param.shape)
    elif momentum != 0:
        raise ValueError(
            f"{op}: expected a momentum_buffer for momentum != 0, got None; "
            "pass a tensor like param"
        )
    if metric_inverse is not None:
        _accumulation_like(op, of_metric, metric_inverse, of_param, param)
        K = param.shape[0]
        _same_shape(op, of_metric, metric_inverse, "[K, K]", [K, K])


def _finite(op: str, numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{op}: expected {name} to be finite, got {value}")
