"""The ops of manifold_conv: how to draw their operands, and what they should yield.

The formulas blend each sample's kernel first, as the kernels do, and take tap by tap what it meets
in an array with zeros around it: x in the forward pass and for the basis points, g for the input.
Zeros of the padding are multiplied like any others: it matters to infinities, not to the bound.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from bounds import Array, Expected, Pass, expect
from entry import Call, Op, einsum
from sampling import Draw, wide
from torch import Tensor

CHANNELS = (0, 1, 1, 2, 3, 5, 17)
KERNEL = (1, 1, 2, 3, 3, 4)


# Operands


def conv_draw(roles: str) -> Callable[[Draw, int], Call]:
    def draw(d: Draw, most: int) -> Call:
        while True:
            dims, groups = d.pick(1, 2, 2, 3), d.pick(1, 1, 1, 2, 3)
            B, K = d.pick(0, 1, 2, 3, 5), d.random.randint(1, 7)
            C, O = d.pick(*CHANNELS), d.pick(*CHANNELS)
            kernel = [d.pick(*KERNEL) for _ in range(dims)]
            stride = [d.pick(1, 1, 2, 3) for _ in range(dims)]
            dilation = [d.pick(1, 1, 1, 2, 3) for _ in range(dims)]
            padding = [d.pick(0, 0, 1, 2, 5) for _ in range(dims)]
            space = []
            for k, r, p in zip(kernel, dilation, padding, strict=True):
                least = max(0, r * (k - 1) + 1 - 2 * p)
                space.append(least + d.pick(0, 0, 1, 2, 3, 7, 12))
            if B * K * groups * C * O * np.prod(kernel) * max(1, np.prod(space)) <= most * 10:
                break
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return conv_call(d, roles, B, K, C, O, space, kernel, options, d.pick(True, False))

    return draw


def conv_large(roles: str) -> Callable[[Draw], Call]:
    def draw(d: Draw) -> Call:
        options = {"stride": [1, 2], "padding": [1, 2], "dilation": [2, 1], "groups": 2}
        call = conv_call(d, roles, 7, 3, 33, 35, [20, 67], [3, 4], options, True)
        if "needed" in call.others:
            call.others["needed"] = [True] * 4
        return call

    return draw


def conv_call(d: Draw, roles: str, B, K, C, O, space, kernel, options, bias) -> Call:
    """C and O are those of a group."""
    groups = options["groups"]
    walk = Walk(kernel, **options)
    make = {
        "x": lambda: d.tensor(B, groups * C, *space),
        "g": lambda: d.tensor(B, groups * O, *walk.output(space)),
        "P": lambda: d.tensor(K, groups * O, C, *kernel),
        "c": lambda: d.coeff(B, K),
        "b": lambda: d.tensor(K, groups * O) if bias else None,
    }
    call = Call([make[role]() for role in roles], dict(options))
    if roles[0] == "g":
        call.others["needed"] = [d.random.random() < 0.8 for _ in range(4)]
    return call


# Formulas


@dataclass(frozen=True)
class Walk:
    """Which pixels meet: q stride + t dilation - padding in x, and q in y."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def output(self, space) -> list[int]:
        each = zip(space, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - r * (k - 1) - 1) // s + 1 for n, k, s, p, r in each]

    def taps(self):
        return itertools.product(*(range(k) for k in self.kernel))

    def split(self, t: Array, axis: int = 1) -> Array:
        """[B, channels, ...] to [B, groups, channels of one, ...]."""
        shape = t.shape
        return t.reshape(*shape[:axis], self.groups, shape[axis] // self.groups, *shape[axis + 1 :])

    def seen(self, x: Array, tap) -> Array:
        """What a tap meets in x [B, groups, C, space], with a pixel of y in each place."""
        around = [(p, p) for p in self.padding]
        padded = np.pad(x, [(0, 0)] * 3 + around)
        met = [
            slice(t * r, t * r + (n - 1) * s + 1, s)
            for t, n, s, r in zip(
                tap, self.output(x.shape[3:]), self.stride, self.dilation, strict=True
            )
        ]
        return padded[(..., *met)]

    def add_back(self, product: Callable[[Array], Array], g: Array, out: Array) -> None:
        """Adds to out [B, groups, C, space] what each tap makes of g, of which zeros lie around."""
        space = out.shape[3:]
        reach = [
            n + p + r * k
            for n, p, r, k in zip(space, self.padding, self.dilation, self.kernel, strict=True)
        ]
        padded = np.pad(g, [(0, 0)] * 3 + [(n, n) for n in reach])
        for tap in self.taps():
            to, of = [], []
            for t, s, p, r, n, before in zip(
                tap, self.stride, self.padding, self.dilation, space, reach, strict=True
            ):
                first = (t * r - p) % s  # where x is met, by g or the zeros around
                q = (first + p - t * r) // s
                to.append(slice(first, n, s))
                of.append(slice(before + q, before + q + max(0, -(-(n - first) // s))))
            out[(..., *to)] += product(tap, padded[(..., *of)])


def blended(at: Pass, walk: Walk, t: dict[str, Array]) -> Array:
    """Each sample's kernel, [B, groups, O, C, taps ...]; what is stored may be flushed."""
    K = t["P"].shape[0]
    rows = t["P"].reshape(K, int(np.prod(t["P"].shape[1:])))
    weight = einsum("bk,kn->bn", t["c"], rows) + at.tiny
    return walk.split(weight.reshape(t["c"].shape[0], *t["P"].shape[1:]))


def output(at: Pass, walk: Walk, t: dict[str, Array]) -> Array:
    x, weight = walk.split(t["x"]), blended(at, walk, t)
    space = walk.output(x.shape[3:])
    y = np.zeros((*weight.shape[:3], int(np.prod(space))), weight.dtype)
    if "b" in t:
        y = y + walk.split(einsum("bk,ko->bo", t["c"], t["b"]))[..., None]
    for tap in walk.taps():
        y = y + einsum("bgoc,bgcn->bgon", weight[(..., *tap)], flat(walk.seen(x, tap)))
    return y.reshape(x.shape[0], t["P"].shape[1], *space)


def flat(pixels: Array) -> Array:
    return pixels.reshape(*pixels.shape[:3], int(np.prod(pixels.shape[3:])))


def grad_input(at: Pass, walk: Walk, t: dict[str, Array], x: Array) -> Array:
    weight, g = blended(at, walk, t), walk.split(t["g"])
    out = np.zeros(walk.split(x).shape, weight.dtype)

    def product(tap, pixels: Array) -> Array:
        back = einsum("bgoc,bgon->bgcn", weight[(..., *tap)], flat(pixels))
        return back.reshape(*back.shape[:3], *pixels.shape[3:])

    walk.add_back(product, g, out)
    return out.reshape(x.shape)


def sample_grads(walk: Walk, t: dict[str, Array], basis: Array) -> Array:
    """Each sample's gradient of its kernel, [B, O, C / groups, taps ...]."""
    x, g = walk.split(t["x"]), flat(walk.split(t["g"]))
    B, O, C = x.shape[0], basis.shape[1], basis.shape[2]
    grads = np.zeros((B, walk.groups, O // walk.groups, C, *walk.kernel), g.dtype)
    for tap in walk.taps():
        grads[(..., *tap)] = einsum("bgon,bgcn->bgoc", g, flat(walk.seen(x, tap)))
    return grads.reshape(B, *basis.shape[1:])


def pixel_sums(t: dict[str, Array]) -> Array:
    g = t["g"]
    return g.reshape(*g.shape[:2], int(np.prod(g.shape[2:]))).sum(2)


def grad_coeff(walk: Walk, t: dict[str, Array]) -> Array:
    grads = sample_grads(walk, t, t["P"])
    size = int(np.prod(t["P"].shape[1:]))
    total = einsum("bn,kn->bk", *(u.reshape(u.shape[0], size) for u in (grads, t["P"])))
    return total if "b" not in t else total + einsum("bo,ko->bk", pixel_sums(t), t["b"])


def oracle(roles: str, results: str) -> Callable[..., list[Expected]]:
    def run(*tensors: Tensor | None, needed=(True,) * 4, **options: Any) -> list[Expected]:
        named = {r: t for r, t in zip(roles, tensors, strict=True) if t is not None}
        walk = Walk(list(named["P"].shape[3:]), **options)
        wanted = [r if need else "" for r, need in zip(results, needed, strict=False)]
        return [one_result(walk, named, result) for result in wanted]

    return run


def one_result(walk: Walk, named: dict[str, Tensor], result: str) -> Expected:
    dtype = named["x"].dtype
    if result == "":  # a gradient that is not needed
        nothing = np.zeros(0)
        return Expected(nothing, nothing, nothing, 0, dtype, dtype)
    basis = named["P"]

    def formula(at: Pass, *values: Array) -> Array:
        t = dict(zip(named, values, strict=True))
        if result == "y":
            return output(at, walk, t)
        if result == "x":
            return grad_input(at, walk, t, t["x"])
        if result == "c":
            return grad_coeff(walk, t)
        if result == "b":
            return einsum("bk,bo->ko", t["c"], pixel_sums(t))
        grads = sample_grads(walk, t, t["P"])
        flat_grads = grads.reshape(grads.shape[0], int(np.prod(grads.shape[1:])))
        return einsum("bk,bn->kn", t["c"], flat_grads).reshape(basis.shape)

    B, K, O = named["x"].shape[0], basis.shape[0], basis.shape[1]
    taps, depth = int(np.prod(walk.kernel)), int(np.prod(basis.shape[2:]))
    pixels = int(np.prod(walk.output(named["x"].shape[2:])))
    terms = {
        "y": depth + K + 1,
        "x": O // walk.groups * taps + K,
        "P": pixels + B + 16,  # and of 16 slices of the batch
        "b": pixels + B,
        "c": pixels + O * (depth + 1),
    }
    kind = wide(dtype) if result == "c" else dtype
    return expect(formula, list(named.values()), terms[result], kind, dtype)


CONV = (
    Op(
        "manifold_conv",
        conv_draw("xPcb"),
        conv_large("xPcb"),
        oracle("xPcb", "y"),
        pads=True,
    ),
    Op(
        "manifold_conv_backward",
        conv_draw("gxPcb"),
        conv_large("gxPcb"),
        oracle("gxPcb", "xPcb"),
        differentiable=False,
        pads=True,
    ),
)
