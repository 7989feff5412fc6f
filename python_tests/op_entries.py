"""How to draw the operands of each op, and what it should yield.

Formulas are numpy's einsums. They sum in the order that the kernels document (a basis point's
product first, then the mixture), which matters to where infinities become NaN, not to the bound.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from bounds import Array, Expected, expect
from sampling import Draw, wide
from torch import Tensor


@dataclass
class Call:
    """Arguments of one call, tensors by position and numbers by name."""

    tensors: list[Tensor | None]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: As in ``neuromod_ext._ops.NAMES``.
        draw: Arguments whose sizes multiply to at most the given number.
        large: Arguments large enough for several threads.
        oracle: What the call yields: for a mutating op its operands afterwards, else its result.
        mutates: Positions of the operands that it changes.
        differentiable: Whether autograd knows its derivative.
        dtypes: Dtypes of its operands.
    """

    name: str
    draw: Callable[[Draw, int], Call]
    large: Callable[[Draw], Call]
    oracle: Callable[..., list[Expected]]
    mutates: tuple[int, ...] = ()
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def run(self, function: Callable[..., Any], call: Call) -> list[Tensor]:
        out = function(*call.tensors, **call.numbers)
        if not self.mutates:
            return [out]
        assert out is None
        return [call.tensors[i] for i in self.mutates if call.tensors[i] is not None]


def einsum(equation: str, *operands: Array) -> Array:
    """numpy's, which leaves the result uninitialised where a sum has no terms."""
    if all(t.size for t in operands):
        return np.einsum(equation, *operands)
    terms, result = equation.split("->")
    sizes = {}
    for letters, t in zip(terms.split(","), operands, strict=True):
        sizes.update(zip(letters, t.shape, strict=True))
    return np.zeros([sizes[letter] for letter in result], operands[0].dtype)


def tokens(t: Array) -> Array:
    return t.reshape(t.shape[0], -1 if t.size else int(np.prod(t.shape[1:-1])), t.shape[-1])


def rows(t: Array) -> Array:
    return t.reshape(t.shape[0], int(np.prod(t.shape[1:])))


# manifold_linear and the three contractions that leave another operand out


def linear_draw(roles: str) -> Callable[[Draw, int], Call]:
    def draw(d: Draw, most: int) -> Call:
        B, T, O, I = d.sizes(4, most // 4)
        K = d.random.randint(1, 16 if most >= B * T * O * I * 16 else 4)
        middle = d.pick((), (), (T,), (T, 1), (1, T)) if most >= B * T * O * I * K else ()
        return linear_call(d, roles, B, middle, K, O, I, bias=d.pick(True, False))

    return draw


def linear_large(roles: str) -> Callable[[Draw], Call]:
    return lambda d: linear_call(d, roles, 75, (4,), 3, 150, 200, bias=True)


def linear_call(d: Draw, roles: str, B, middle, K, O, I, bias) -> Call:
    make = {
        "x": lambda: d.tensor(B, *middle, I),
        "g": lambda: d.tensor(B, *middle, O),
        "P": lambda: d.tensor(K, O, I),
        "c": lambda: d.coeff(B, K),
        "b": lambda: d.tensor(K, O) if bias else None,
    }
    return Call([make[role]() for role in roles])


def linear_forward(x: Tensor, P: Tensor, c: Tensor, bias: Tensor | None = None) -> list[Expected]:
    K, _, I = P.shape

    def formula(at, x, P, c, b=None):
        z = einsum("bti,koi->btko", tokens(x), P)
        y = einsum("btko,bk->bto", z if b is None else z + b, c)
        return y.reshape(*x.shape[:-1], P.shape[1])

    operands = [x, P, c] if bias is None else [x, P, c, bias]
    return [expect(formula, operands, I + K, x.dtype, x.dtype)]


def linear_grad_input(g: Tensor, P: Tensor, c: Tensor) -> list[Expected]:
    K, O, _ = P.shape

    def formula(at, g, P, c):
        x = einsum("btki,bk->bti", einsum("bto,koi->btki", tokens(g), P), c)
        return x.reshape(*g.shape[:-1], P.shape[2])

    return [expect(formula, [g, P, c], O + K, g.dtype, g.dtype)]


def linear_grad_basis(g: Tensor, x: Tensor, c: Tensor) -> list[Expected]:
    def formula(at, g, x, c):
        cg = einsum("bk,bto->btko", c, tokens(g)) + at.tiny  # stored in the dtype of g
        return einsum("btko,bti->koi", cg, tokens(x))

    samples = x.numel() // max(x.shape[-1], 1)
    return [expect(formula, [g, x, c], samples + 1, g.dtype, g.dtype)]


def linear_grad_coeff(g: Tensor, x: Tensor, P: Tensor) -> list[Expected]:
    _, O, I = P.shape

    def formula(at, g, x, P):
        return einsum("btki,bti->bk", einsum("bto,koi->btki", tokens(g), P), tokens(x))

    T = int(np.prod(x.shape[1:-1]))
    return [expect(formula, [g, x, P], O + I + T, wide(g.dtype), g.dtype)]


# interpolate_weights and its gradients


def interpolate_draw(roles: str) -> Callable[[Draw, int], Call]:
    def draw(d: Draw, most: int) -> Call:
        B, first, second = d.sizes(3, most // 16)
        rest = d.pick((), (first,), (first, second), (second, 1, first))
        return interpolate_call(d, roles, B, d.random.randint(1, 16), rest)

    return draw


def interpolate_call(d: Draw, roles: str, B: int, K: int, rest: tuple[int, ...]) -> Call:
    make = {
        "P": lambda: d.tensor(K, *rest),
        "g": lambda: d.tensor(B, *rest),
        "c": lambda: d.coeff(B, K),
    }
    return Call([make[role]() for role in roles])


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


OPS = {
    op.name: op
    for op in (
        Op("manifold_linear", linear_draw("xPcb"), linear_large("xPcb"), linear_forward),
        Op(
            "manifold_linear_grad_input", linear_draw("gPc"), linear_large("gPc"), linear_grad_input
        ),
        Op(
            "manifold_linear_grad_basis", linear_draw("gxc"), linear_large("gxc"), linear_grad_basis
        ),
        Op(
            "manifold_linear_grad_coeff", linear_draw("gxP"), linear_large("gxP"), linear_grad_coeff
        ),
        Op("interpolate_weights", interpolate_draw("Pc"), interpolate_large("Pc"), interpolate),
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
    )
}
