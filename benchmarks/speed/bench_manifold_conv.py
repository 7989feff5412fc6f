"""manifold_conv2d: a kernel for each sample."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.correctness import expect_by_autograd
from benchmarks.speed.limits import Work
from benchmarks.speed.peers import wide
from benchmarks.speed.problem import (
    BACKWARD,
    FIRST,
    FORWARD,
    Draw,
    Group,
    Layout,
    Problem,
    Variant,
    both,
    public,
)

ALL = ("input", "basis", "coeff")
LOOP = 64  # samples up to which a loop over them is tried
# B, C, O, side of the image, side of the kernel, stride, padding
SHAPES = {
    (32, 64, 64, 32, 3, 1, 1): both(1.1),
    (32, 128, 128, 16, 3, 1, 1): both(1.25),
    (64, 3, 32, 32, 5, 1, 0): both(2.2),
    (64, 16, 32, 14, 3, 2, 0): both(),
}
NUM_BASIS = 3


def manifold_conv(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """Each sample has its own condition, and so its own kernel."""
    shapes = {(4, 3, 8, 7, 3, 2, 1): both()} if quick else SHAPES
    for sizes, goals in shapes.items():
        shape = dict(zip(("B", "C", "O", "H", "k", "stride", "pad"), sizes, strict=True))
        build = partial(problem, *sizes, dtype)
        yield Group("manifold_conv", shape | {"K": NUM_BASIS}, dtype, goals, build)


def problem(
    B: int,
    C: int,
    O: int,
    H: int,
    k: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """A convolution whose kernels K basis points span."""
    draw = Draw(dtype, device)
    operands = {
        "input": draw.normal(B, C, H, H),
        "basis": draw.normal(NUM_BASIS, O, C, k, k),
        "coeff": draw.coeff(B, NUM_BASIS),
    }
    side = (H + 2 * padding - k) // stride + 1
    options = {"stride": stride, "padding": padding}
    grad_output = draw.normal(B, O, side, side)
    pixels, taps, points = side * side, C * k * k, NUM_BASIS * O * C * k * k
    flops = 2 * B * (pixels * O * taps + points)
    moved = operands["basis"].element_size() * (points + B * (C * H * H + O * pixels))
    product = (B * pixels, taps, O)
    terms = {
        "output": taps + NUM_BASIS,
        "input": O * k * k + NUM_BASIS,
        "basis": B * pixels + 1,
        "coeff": pixels + O * taps,
    }
    return Problem(
        operands,
        _variants(NUM_BASIS, B, C, O, k, options),
        partial(expect_by_autograd, partial(grouped, **options), operands, grad_output, ALL, terms),
        {FORWARD: Work(flops, moved, product), BACKWARD: Work(3 * flops, 3 * moved, product)},
        grad_output,
        ALL,
    )


def _variants(K: int, B: int, C: int, O: int, k: int, options: dict[str, int]) -> list[Variant]:
    last = {"input": LAST, "basis": stacked_last(K)}
    found = [
        Variant("neuromod_ext", partial(public("manifold_conv2d"), **options), "ours"),
        Variant("grouped (CondConv)", partial(grouped, **options)),
        Variant("stacked + einsum", partial(stacked_einsum, **options)),
        Variant("stacked + sum", partial(stacked_sum, **options)),
        Variant("stacked, channels last", partial(stacked_flat, **options), layouts=last),
        Variant("separate", partial(separate, **options)),
        Variant("scaled, own layout", partial(scaled, **options), layouts={"basis": wide(K)}),
        Variant("unfold + bmm", partial(unfolded, **options)),
    ]
    if B <= LOOP:
        found.append(Variant("loop over samples", partial(loop, **options)))
    if find_spec("timm"):
        found.append(Variant("timm CondConv2d", partial(cond_conv, **options)))
    plain = Variant("plain layer", partial(_plain, **options), "plain", {"basis": FIRST})
    return [*found, plain]


def _kernels(basis: Tensor, coeff: Tensor) -> Tensor:
    """A kernel for each sample, [B, O, C, kH, kW]."""
    return (coeff.to(basis.dtype) @ basis.flatten(1)).unflatten(1, basis.shape[1:])


def grouped(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """CondConv's way: a kernel for each sample, one convolution with a group for each."""
    B, kernels = len(input), _kernels(basis, coeff)
    rows = input.flatten(0, 1).unsqueeze(0)
    out = F.conv2d(rows, kernels.flatten(0, 1), groups=B, **options)
    return out.view(B, -1, *out.shape[2:])


def loop(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """A kernel and a convolution for each sample."""
    pairs = zip(input.split(1), _kernels(basis, coeff), strict=True)
    return torch.cat([F.conv2d(x, kernel, **options) for x, kernel in pairs])


def unfolded(input: Tensor, basis: Tensor, coeff: Tensor, stride: int, padding: int) -> Tensor:
    """A kernel for each sample, and a batched product with its image's patches."""
    k, (H, W) = basis.shape[-1], input.shape[2:]
    patches = F.unfold(input, k, stride=stride, padding=padding)
    out = torch.bmm(_kernels(basis, coeff).flatten(2), patches)
    return out.unflatten(2, [(side + 2 * padding - k) // stride + 1 for side in (H, W)])


def stacked_flat(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """One convolution of K O outputs, basis [K O, C, kH, kW], mixed by einsum."""
    each = F.conv2d(input, basis, **options).unflatten(1, (coeff.shape[1], -1))
    return torch.einsum("bkohw,bk->bohw", each, coeff.to(input.dtype))


def stacked_einsum(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """One convolution of K O outputs, mixed by einsum."""
    return stacked_flat(input, basis.flatten(0, 1), coeff, **options)


def stacked_sum(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """One convolution of K O outputs, mixed by a product and a sum."""
    each = F.conv2d(input, basis.flatten(0, 1), **options).unflatten(1, basis.shape[:2])
    return (each * coeff.to(input.dtype)[..., None, None, None]).sum(1)


def separate(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """K convolutions, scaled and summed."""
    scale = coeff.to(input.dtype)[..., None, None, None]
    return sum(scale[:, k] * F.conv2d(input, P, **options) for k, P in enumerate(basis))


def scaled(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """One convolution of c ⊗ x, of K C channels, with a basis stored as [O, K C, kH, kW]."""
    rows = coeff.to(input.dtype)[..., None, None, None] * input.unsqueeze(1)
    return F.conv2d(rows.flatten(1, 2), basis, **options)


@cache
def _cond_conv(C: int, O: int, k: int, stride: int, padding: int, K: int) -> Any:
    from timm.layers import CondConv2d

    return CondConv2d(C, O, k, stride=stride, padding=padding, num_experts=K)


def cond_conv(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    """CondConv of timm: its experts are the basis points, its routing the coefficients."""
    K, O, C, k, _ = basis.shape
    layer = _cond_conv(C, O, k, options["stride"], options["padding"], K)
    weight = {"weight": basis.flatten(1)}
    return torch.func.functional_call(layer, weight, (input, coeff.to(input.dtype)))


LAST = Layout(lambda x: x.contiguous(memory_format=torch.channels_last), torch.clone)


def stacked_last(num_basis: int) -> Layout:
    """[K O, C, kH, kW] with channels last in place of [K, O, C, kH, kW]."""
    return Layout(
        lambda basis: basis.flatten(0, 1).contiguous(memory_format=torch.channels_last),
        lambda stacked: stacked.unflatten(0, (num_basis, -1)),
    )


def _plain(input: Tensor, basis: Tensor, coeff: Tensor, **options: int) -> Tensor:
    return F.conv2d(input, basis, **options)
