"""manifold_step_: momentum SGD in the metric of the manifold, and without a metric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.correctness import Expected, choose
from benchmarks.speed.limits import Work
from benchmarks.speed.problem import (
    FIRST,
    FORWARD,
    GOAL,
    Draw,
    Group,
    Problem,
    Result,
    Variant,
    public,
)

LR, MOMENTUM = 1e-4, 0.9  # small, since the steps of a whole run add up
SIZES = (512 * 512, 4096 * 4096)
UPDATED = ("param", "momentum_buffer")


def manifold_step(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """One step of K basis points of n numbers each."""
    for size in (192,) if quick else SIZES:
        for metric in (True, False):
            goal = 2.0 if metric and not quick else GOAL
            note = "" if metric else "no metric"
            build = partial(problem, size, metric, dtype)
            shape = {"K": 3, "n": size}
            yield Group("manifold_step", shape, dtype, {FORWARD: goal}, build, note)


def problem(size: int, metric: bool, dtype: torch.dtype, device: torch.device) -> Problem:
    """K basis points of ``size`` numbers each."""
    draw, K = Draw(dtype, device), 3
    operands = {
        "param": draw.normal(K, size),
        "grad": draw.normal(K, size),
        "momentum_buffer": draw.normal(K, size),
    }
    if metric:
        operands["metric_inverse"] = draw.metric_inverse()
    ours = partial(public("manifold_step_"), lr=LR, momentum=MOMENTUM)
    others = [
        Variant("matmul + ops", plain_ops),
        Variant("einsum + ops", einsum_ops),
        Variant("matmul + foreach", foreach),
        Variant("matmul + fused SGD", fused_sgd),
        Variant("addmm + add", in_buffer),
    ]
    if not metric:
        others = [
            Variant("ops", plain_ops),
            Variant("foreach", foreach),
            Variant("fused SGD", fused_sgd),
        ]
    first = dict.fromkeys(("param", "grad", "momentum_buffer"), FIRST)
    return Problem(
        operands,
        [
            Variant("neuromod_ext", ours, "ours"),
            *others,
            Variant("plain layer", _plain, "plain", first),
        ],
        partial(_expected, operands),
        {FORWARD: Work(2 * K * K * size, 5 * K * size * operands["param"].element_size())},
        updated=UPDATED,
    )


def _expected(operands: dict[str, Tensor]) -> dict[str, Expected]:
    chosen = choose(operands["param"].shape[1], operands["param"].device)
    P, g, m = (operands[name][:, chosen].double() for name in ("param", "grad", "momentum_buffer"))
    K = len(P)
    inverse = operands.get("metric_inverse", torch.eye(K, device=P.device)).double()
    buffer = MOMENTUM * m + inverse @ g
    size = MOMENTUM * m.abs() + inverse.abs() @ g.abs()
    return {
        "param": Expected(P - LR * buffer, P.abs() + LR * size, K + 4, {1: chosen}),
        "momentum_buffer": Expected(buffer, size, K + 3, {1: chosen}),
    }


def _mixed(grad: Tensor, metric_inverse: Tensor | None) -> Tensor:
    return grad if metric_inverse is None else metric_inverse.to(grad.dtype) @ grad


def plain_ops(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, metric_inverse: Tensor | None = None
) -> Result:
    """G⁻¹ g by matmul, then one operation at a time."""
    momentum_buffer.mul_(MOMENTUM).add_(_mixed(grad, metric_inverse))
    return param.add_(momentum_buffer, alpha=-LR)


def einsum_ops(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, metric_inverse: Tensor
) -> Result:
    """G⁻¹ g by einsum, then one operation at a time."""
    mixed = torch.einsum("jk,kn->jn", metric_inverse.to(grad.dtype), grad)
    momentum_buffer.mul_(MOMENTUM).add_(mixed)
    return param.add_(momentum_buffer, alpha=-LR)


def foreach(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, metric_inverse: Tensor | None = None
) -> Result:
    """G⁻¹ g by matmul, then ``torch.optim.SGD(foreach=True)``'s operations."""
    buffers = [momentum_buffer]
    torch._foreach_mul_(buffers, MOMENTUM)
    torch._foreach_add_(buffers, [_mixed(grad, metric_inverse)])
    torch._foreach_add_([param], buffers, alpha=-LR)
    return param


def fused_sgd(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, metric_inverse: Tensor | None = None
) -> Result:
    """G⁻¹ g by matmul, then ``torch.optim.SGD(fused=True)``'s operation."""
    torch._fused_sgd_(
        [param],
        [_mixed(grad, metric_inverse)],
        [momentum_buffer],
        weight_decay=0.0,
        momentum=MOMENTUM,
        lr=LR,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    return param


def in_buffer(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, metric_inverse: Tensor
) -> Result:
    """G⁻¹ g added to the buffer by the product itself: nothing is allocated."""
    momentum_buffer.addmm_(metric_inverse.to(grad.dtype), grad, beta=MOMENTUM)
    return param.add_(momentum_buffer, alpha=-LR)


def _plain(param: Tensor, grad: Tensor, momentum_buffer: Tensor, **_: Tensor) -> Result:
    return fused_sgd(param, grad, momentum_buffer)
