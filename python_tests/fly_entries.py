"""The ops of fly hashing: how to draw their operands, and what they should yield.

m[b,j] = sum_k x[b, index[j,k]], a = m - mean(m), h = relu(a); y = R (v h), and the gradients. The
rectifier is continuous, so h is as near as a: its S is |m| + mean |m|. Its derivative is not: a
unit whose a is 0 up to rounding may be active or not. Draws have no such unit (test_fly_hash.py
does).
"""

from collections.abc import Callable

import numpy as np
import torch
from bounds import Array, Expected, Pass, exact, expect
from entry import Call, Op
from sampling import Draw, placed
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "strided", "offset")  # an expanded index ties all units


def projected(x: Array, index: Array, minus: int) -> Array:
    """a, or where ``minus`` is 1 what bounds its magnitude."""
    if index.shape[0] == 0:
        return np.zeros((x.shape[0], 0), x.dtype)
    m = x[:, index].sum(-1)
    return m + minus * m.mean(-1, keepdims=True)


def spread(grad: Array, index: Array, inputs: int, minus: int) -> Array:
    """The transpose of :func:`projected`, input by input."""
    out = np.zeros((grad.shape[0], inputs), grad.dtype)
    if grad.shape[1] == 0:
        return out
    grad = grad + minus * grad.mean(-1, keepdims=True)
    for unit, inputs_of in enumerate(index):
        for i in inputs_of:
            out[:, i] += grad[:, unit]
    return out


def relu(a: Array) -> Array:
    return np.where(a <= 0, 0, a)


def roundings(x: Tensor, index: Tensor) -> int:
    """On the longest path to a: the unit's inputs, then the mean, over the inputs or the units."""
    H, n = index.shape
    return n + x.shape[1] + H // 256 + 16


def certain_units(x: Tensor, index: Tensor) -> Array:
    """Which units of each sample are active, or inactive, whatever the order of their sums."""
    values, at = exact(x), index.cpu().numpy()
    a, S = projected(values, at, -1), projected(np.abs(values), at, 1)
    e = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    return np.abs(a) > 2 * roundings(x, index) * e * S


# Operands


def fly_draw(roles: str) -> Callable[[Draw, int], Call]:
    def draw(d: Draw, most: int) -> Call:
        while True:
            B, I, H, O = d.sizes(4, most // 4)
            n, T = d.random.randint(1, 8), d.random.randint(1, 4)
            if O > 7:
                O = d.pick(O, 10)  # those of AVX-512 that stay in registers
            if I == 0:  # nothing to draw an index from
                n = 0
            call = fly_call(d, roles, B, I, H, n, O, T if d.pick(True, False) else None)
            if certain_units(*operands(roles, call)).all():
                return call

    return draw


def operands(roles: str, call: Call) -> tuple[Tensor, ...]:
    named = dict(zip(roles, call.tensors, strict=False))
    return named["x"], named["i"]


def fly_call(d: Draw, roles: str, B: int, I: int, H: int, n: int, O: int, T: int | None) -> Call:
    def index() -> Tensor:
        values = [d.random.randrange(I) for _ in range(H * n)]
        dtype = d.pick(torch.int64, torch.int32)
        whole = torch.tensor(values, dtype=dtype, device=d.device).view(H, n)
        return placed(whole, "plain" if d.layouts == ("plain",) else d.pick(*LAYOUTS))

    def task() -> Tensor | None:
        if T is None:
            return None
        values = [d.random.randrange(T) for _ in range(B)]
        return placed(
            torch.tensor(values, dtype=torch.int64, device=d.device), d.pick(*d.layouts[:1])
        )

    make = {
        "x": lambda: d.tensor(B, I),
        "i": index,
        "v": lambda: d.tensor(*(() if T is None else (T,)), H),
        "R": lambda: d.tensor(O, H),
        "t": task,
        "g": lambda: d.tensor(B, O),
        "q": lambda: d.tensor(B, H),
    }
    call = Call([make[role]() for role in roles])
    if roles[0] == "g":
        call.others["needed"] = [d.random.random() < 0.8 for _ in range(3)]
    return call


def fly_large(roles: str) -> Callable[[Draw], Call]:
    def draw(d: Draw) -> Call:
        call = fly_call(d, roles, 75, 97, 2500, 7, 11, 3)
        if call.others:
            call.others["needed"] = [True] * 3
        return call

    return draw


# Results


def hash_result(x: Tensor, index: Tensor) -> list[Expected]:
    at = index.cpu().numpy()
    terms = roundings(x, index)
    return [expect(lambda p, x: relu(projected(x, at, p.minus)), [x], terms, x.dtype, x.dtype)]


def hash_backward(q: Tensor, x: Tensor, index: Tensor) -> list[Expected]:
    at = index.cpu().numpy()

    def formula(p: Pass, q: Array, x: Array) -> Array:
        return spread(np.where(projected(x, at, p.minus) <= 0, 0, q), at, x.shape[1], p.minus)

    return [expect(formula, [q, x], 2 * index.numel() + 4, x.dtype, x.dtype)]


def of_samples(v: Array, task: Tensor | None) -> Array:
    return v if task is None else v[task.cpu().numpy()]


def readout(
    x: Tensor, index: Tensor, v: Tensor, R: Tensor, task: Tensor | None = None
) -> list[Expected]:
    at = index.cpu().numpy()

    def formula(p: Pass, x: Array, v: Array, R: Array) -> Array:
        h = relu(projected(x, at, p.minus)) * of_samples(v, task)
        return (h[:, None] * R).sum(-1)

    terms = roundings(x, index) + index.shape[0] + 2
    return [expect(formula, [x, v, R], terms, x.dtype, x.dtype)]


def readout_backward(
    g: Tensor,
    x: Tensor,
    index: Tensor,
    v: Tensor,
    R: Tensor,
    task: Tensor | None,
    needed: list[bool],
) -> list[Expected]:
    at, B, O = index.cpu().numpy(), x.shape[0], R.shape[0]

    def signal(g: Array, R: Array) -> Array:
        return (g[:, :, None] * R).sum(1)

    def grad_input(p: Pass, g: Array, x: Array, v: Array, R: Array) -> Array:
        q = signal(g, R) * of_samples(v, task)
        return spread(np.where(projected(x, at, p.minus) <= 0, 0, q), at, x.shape[1], p.minus)

    def grad_gain(p: Pass, g: Array, x: Array, v: Array, R: Array) -> Array:
        products = relu(projected(x, at, p.minus)) * signal(g, R)
        if task is None:
            return products.sum(0)
        total = np.zeros_like(v)
        np.add.at(total, task.cpu().numpy(), products)
        return total

    def grad_readout(p: Pass, g: Array, x: Array, v: Array, R: Array) -> Array:
        h = relu(projected(x, at, p.minus)) * of_samples(v, task)
        return (g[:, :, None] * h[:, None]).sum(0)

    terms = {
        grad_input: 2 * index.numel() + O + 8,
        grad_gain: roundings(x, index) + O + B + 4,
        grad_readout: roundings(x, index) + B + 4,
    }
    return [
        expect(formula, [g, x, v, R], n, x.dtype, x.dtype)
        if need
        else expect(lambda at, t: t, [x.new_empty(0)], 0, x.dtype, x.dtype)
        for (formula, n), need in zip(terms.items(), needed, strict=True)
    ]


FLY = (
    Op("fly_hash", fly_draw("xi"), fly_large("xi"), hash_result),
    Op("fly_hash_backward", fly_draw("qxi"), fly_large("qxi"), hash_backward, differentiable=False),
    Op("fly_readout", fly_draw("xivRt"), fly_large("xivRt"), readout),
    Op(
        "fly_readout_backward",
        fly_draw("gxivRt"),
        fly_large("gxivRt"),
        readout_backward,
        differentiable=False,
    ),
)
