"""hadamard_rotate, and the same in place: how to draw operands, and what they should yield.

The formula adds and subtracts level by level, as the definition by Kronecker products of
[[1, 1], [1, -1]] does; each element is a sum of terms of either sign.
"""

import numpy as np
import torch
from bounds import Array, Expected, expect
from entry import Call, Op
from sampling import Draw, placed
from torch import Tensor

COUNT = 3  # tensors that are rotated in place as one vector
DTYPES = (torch.float64, torch.float32)


def blocks(n: int) -> list[tuple[int, int]]:
    """Where the rotations begin, and log2 of how many elements they take."""
    first = 0
    while 2 ** (first + 1) <= n:
        first += 1
    rest = n - 2**first
    if rest == 0:
        return [(0, first)]
    last = 0
    while last < first and 2**last < 2 * rest:
        last += 1
    return [(0, first), (n - 2**last, last)]


def rotated(x: Array, signs: Array, minus: int, inverse: bool) -> Array:
    n, x = x.shape[-1], x.copy()
    order, offset = [], 0
    for begin, levels in blocks(n):
        order.append((begin, levels, signs[offset : offset + 2**levels]))
        offset += 2**levels
    for begin, levels, d in reversed(order) if inverse else order:
        y, scale = x[..., begin : begin + 2**levels], x.dtype.type(2) ** (-levels / 2)
        y = y if inverse else y * d * scale
        for level in range(levels):
            pairs = y.reshape(*y.shape[:-1], 2 ** (levels - level - 1), 2, 2**level)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            y = np.stack((a + b, a + minus * b), -2).reshape(y.shape)
        x[..., begin : begin + 2**levels] = y * d * scale if inverse else y
    return x


def roundings(n: int) -> int:
    return sum(levels + 2 for _, levels in blocks(n))


def rotation(x: Tensor, signs: Tensor, inverse: bool = False) -> list[Expected]:
    def formula(at, x, d):
        return rotated(x, d, at.minus, inverse)

    return [expect(formula, [x, signs], roundings(x.shape[-1]), x.dtype, x.dtype)]


def rotation_in_place(*tensors: Tensor, inverse: bool = False) -> list[Expected]:
    parts = tensors[:-1]
    n = sum(t.numel() for t in parts)

    def formula(i: int):
        def of_part(at, *values):
            *xs, d = values
            flat = rotated(np.concatenate([x.reshape(-1) for x in xs]), d, at.minus, inverse)
            begin = sum(x.size for x in xs[:i])
            return flat[begin : begin + xs[i].size].reshape(xs[i].shape)

        return of_part

    return [
        expect(formula(i), list(tensors), roundings(n), t.dtype, t.dtype)
        for i, t in enumerate(parts)
    ]


def signs(d: Draw, n: int) -> Tensor:
    count = sum(2**levels for _, levels in blocks(n))
    values = torch.tensor(d.random.choices((-1, 1), k=count), dtype=torch.int8, device=d.device)
    return placed(values, d.pick(*(name for name in d.layouts if name != "expanded")))


def inverse(d: Draw) -> dict[str, bool]:
    return {"inverse": d.pick(True, False)}


def draw(d: Draw, most: int) -> Call:
    first, second = d.sizes(2, max(1, most // 256))
    n = d.pick(1, 2, 3, 5, 8, 13, 31, 64, 67, 100, 127, 128)
    rest = d.pick((), (first,), (first, second))
    return Call([d.tensor(*rest, n), signs(d, n)], inverse(d))


def draw_in_place(d: Draw, most: int) -> Call:
    shapes = [d.sizes(2, max(1, most // 8))[: d.pick(1, 2)] for _ in range(COUNT)]
    if sum(int(np.prod(shape)) for shape in shapes) == 0:
        shapes[0] = [3]
    return call_in_place(d, shapes)


def call_in_place(d: Draw, shapes: list[list[int]]) -> Call:
    parts = [d.tensor(*shape, in_place=True) for shape in shapes]
    return Call([*parts, signs(d, sum(t.numel() for t in parts))], inverse(d))


def large(d: Draw) -> Call:
    return Call([d.tensor(2, 40_000), signs(d, 40_000)], inverse(d))


HADAMARD = (
    Op("hadamard_rotate", draw, large, rotation, dtypes=DTYPES),
    Op(
        "hadamard_rotate_",
        draw_in_place,
        lambda d: call_in_place(d, [[150, 200], [70], [9930]]),
        rotation_in_place,
        mutates=tuple(range(COUNT)),
        differentiable=False,
        dtypes=DTYPES,
        lists=lambda tensors: [tensors[:COUNT], tensors[COUNT]],
    ),
)
