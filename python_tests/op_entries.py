"""How to draw the operands of each op, and what it should yield.

Formulas are numpy's einsums. They sum in the order that the kernels document, which matters to
where infinities become NaN, not to the bound.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bounds import Array, Expected, expect
from conv_entries import CONV
from entry import Call, Op, einsum, rows
from fly_entries import FLY
from hadamard_entries import HADAMARD
from linear_entries import LINEAR
from sampling import Draw, wide
from torch import Tensor

# interpolate_weights and its gradients


def interpolate_draw(roles: str) -> Callable[[Draw, int], Call]:
    def draw(d: Draw, most: int) -> Call:
        B, first, second = d.sizes(3, most // 16)
        rest = d.pick((), (first,), (first, second), (second, 1, first))
        call = interpolate_call(d, roles, B, d.random.randint(1, 16), rest)
        if call.others:
            call.others["needed"] = d.pick([True, True], [True, True], [False, True], [True, False])
        return call

    return draw


def interpolate_call(d: Draw, roles: str, B: int, K: int, rest: tuple[int, ...]) -> Call:
    make = {
        "P": lambda: d.tensor(K, *rest),
        "g": lambda: d.tensor(B, *rest),
        "c": lambda: d.coeff(B, K),
    }
    both = {"needed": [True, True]} if len(roles) == 3 else {}
    return Call([make[role]() for role in roles], both)


def interpolate_large(roles: str) -> Callable[[Draw], Call]:
    return lambda d: interpolate_call(d, roles, 30, 5, (50, 70))


def interpolate(P: Tensor, c: Tensor) -> list[Expected]:
    def formula(at, P, c):
        return einsum("kn,bk->bn", rows(P), c).reshape(c.shape[0], *P.shape[1:])

    return [expect(formula, [P, c], P.shape[0], P.dtype, P.dtype)]


def interpolate_grad_basis(g: Tensor, c: Tensor) -> list[Expected]:
    def formula(at, g, c):
        return einsum("bn,bk->kn", rows(g), c).reshape(c.shape[1], *g.shape[1:])

    return [expect(formula, [g, c], g.shape[0], g.dtype, g.dtype)]


def interpolate_grad_coeff(g: Tensor, P: Tensor) -> list[Expected]:
    def formula(at, g, P):
        return einsum("bn,kn->bk", rows(g), rows(P))

    length = int(np.prod(g.shape[1:]))
    return [expect(formula, [g, P], length, wide(g.dtype), g.dtype)]


def interpolate_backward(g: Tensor, P: Tensor, c: Tensor, needed: list[bool]) -> list[Expected]:
    nothing = expect(lambda at, t: t, [P.new_empty(0)], 0, P.dtype, P.dtype)
    grad_basis = interpolate_grad_basis(g, c) if needed[0] else [nothing]
    return grad_basis + (interpolate_grad_coeff(g, P) if needed[1] else [nothing])


# manifold_metric


def metric_draw(d: Draw, most: int) -> Call:
    N, K = d.pick(0, 1, 2, 3, 7, 67, 256, 257, 521), d.random.randint(0, 16)
    weighted = N == 0 or d.pick(True, False)
    return Call([d.coeff(N, K), d.coeff(N) if weighted else None])


def metric_large(d: Draw) -> Call:
    return Call([d.coeff(5000, 9), d.coeff(5000)])


def metric(c: Tensor, w: Tensor | None = None) -> list[Expected]:
    N = c.shape[0]

    def formula(at, c, w=None):
        return einsum("nj,nk->jk", c, c) / N if w is None else einsum("n,nj,nk->jk", w, c, c)

    operands = [c] if w is None else [c, w]
    return [expect(formula, operands, N, c.dtype, c.dtype, accumulator=2.0**-53)]


# manifold_step_


def step_draw(d: Draw, most: int) -> Call:
    first, second = d.sizes(2, most // 64)
    rest = d.pick((), (first,), (first, second), (second, 1, first))
    return step_call(d, d.random.randint(1, 16), rest, d.pick(True, False), d.pick(True, False))


def step_call(d: Draw, K: int, rest: tuple[int, ...], buffer: bool, metric: bool) -> Call:
    momentum = d.pick(0.0, 0.9) if buffer else 0.0
    numbers = {
        "lr": d.pick(0.0, 0.1, 1.5),
        "momentum": momentum,
        "dampening": d.pick(0.0, 0.3),
        "weight_decay": d.pick(0.0, 0.01),
        "nesterov": d.pick(True, False),
        "maximize": d.pick(True, False),
        "first_step": d.pick(True, False),
    }
    param, grad = d.tensor(K, *rest, in_place=True), d.tensor(K, *rest)
    buffer_ = d.tensor(K, *rest, in_place=True) if buffer else None
    return Call([param, grad, buffer_, d.coeff(K, K) if metric else None], numbers)


def step_large(d: Draw) -> Call:
    return step_call(d, 3, (150, 200), True, True)


def step(param, grad, buffer=None, inverse=None, **numbers) -> list[Expected]:
    named = {"p": param, "g": grad, "m": buffer, "G": inverse}
    operands = {name: t for name, t in named.items() if t is not None}

    def formula(result: str):
        return lambda at, *values: step_formula(
            result, at.minus, dict(zip(operands, values, strict=True)), **numbers
        )

    terms = param.shape[0] + 12  # what a number is rounded, multiplied and added along the way
    return [
        expect(formula(result), list(operands.values()), terms, param.dtype, param.dtype)
        for result in ("p", "m")
        if result in operands
    ]


def step_formula(
    result: str,
    minus: int,
    values: dict[str, Array],
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
) -> Array:
    p, d, m = values["p"], values["g"], values.get("m")
    if "G" in values:
        d = einsum("jk,kn->jn", values["G"], rows(d)).reshape(d.shape)
    d = (minus if maximize else 1) * d + weight_decay * p
    if m is not None:
        m = d if first_step else momentum * m + (1 - dampening) * d
        d = d + momentum * m if nesterov else m
    return m if result == "m" else p + minus * lr * d


# manifold_step_foreach_, of three parameters: their P, g, m and inverses, then the rate

COUNT = 3


def foreach_draw(d: Draw, most: int) -> Call:
    rests = [d.sizes(2, most // 192) for _ in range(COUNT)]
    return foreach_call(d, [(d.random.randint(1, 16), *rest[: d.pick(0, 1, 2)]) for rest in rests])


def foreach_call(d: Draw, shapes: list[tuple[int, ...]]) -> Call:
    buffer = d.pick(True, False)
    calls = [step_call(d, K, tuple(rest), buffer, d.pick(True, True, False)) for K, *rest in shapes]
    numbers = dict(calls[0].others)
    rate = d.values(dtype=torch.float64).fill_(numbers.pop("lr"))
    return Call([*(call.tensors[i] for i in range(4) for call in calls), rate], numbers)


def foreach_large(d: Draw) -> Call:
    return foreach_call(d, [(3, 150, 200), (5, 70), (3, 4000)])


def foreach_lists(tensors: list[Tensor | None]) -> list[Any]:
    params, grads, buffers, inverses = (tensors[i : i + COUNT] for i in range(0, 4 * COUNT, COUNT))
    return [params, grads, [] if buffers[0] is None else buffers, inverses, tensors[-1]]


def foreach(*tensors, **numbers) -> list[Expected]:
    rate = tensors[-1].item()
    each = [step(*tensors[i : 4 * COUNT : COUNT], lr=rate, **numbers) for i in range(COUNT)]
    return [result for results in zip(*each, strict=True) for result in results]


OPS = {
    op.name: op
    for op in (
        *LINEAR,
        *CONV,
        *FLY,
        *HADAMARD,
        Op("interpolate_weights", interpolate_draw("Pc"), interpolate_large("Pc"), interpolate),
        Op(
            "interpolate_weights_backward",
            interpolate_draw("gPc"),
            interpolate_large("gPc"),
            interpolate_backward,
            differentiable=False,
        ),
        Op(
            "interpolate_weights_grad_basis",
            interpolate_draw("gc"),
            interpolate_large("gc"),
            interpolate_grad_basis,
        ),
        Op(
            "interpolate_weights_grad_coeff",
            interpolate_draw("gP"),
            interpolate_large("gP"),
            interpolate_grad_coeff,
        ),
        Op(
            "manifold_metric",
            metric_draw,
            metric_large,
            metric,
            dtypes=(torch.float64, torch.float32),
        ),
        Op("manifold_step_", step_draw, step_large, step, mutates=(0, 2), differentiable=False),
        Op(
            "manifold_step_foreach_",
            foreach_draw,
            foreach_large,
            foreach,
            mutates=(0, 1, 2, 6, 7, 8),
            differentiable=False,
            lists=foreach_lists,
        ),
    )
}
