"""manifold_linear: independent conditions, conditions shared by tokens, one condition for all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed import peers
from benchmarks.speed.correctness import expect_linear
from benchmarks.speed.limits import Work
from benchmarks.speed.problem import (
    BACKWARD,
    FIRST,
    FORWARD,
    Draw,
    Goals,
    Group,
    Problem,
    Variant,
    both,
    public,
)
from neuromod_ext import _ops

ALL = ("input", "basis", "coeff")
FIXED = ("input", "basis")  # where the condition is given, nobody asks for its gradient

FLOAT32 = {
    (64, 128, 128, 3): both(2.0),
    (256, 512, 512, 3): both(2.5, 2.3),
    (1024, 1024, 1024, 3): both(2.5, 2.3),
    (32, 4096, 4096, 3): both(2.8, 3.0),
    (1, 2048, 2048, 3): both(1.0, 3.0),
}
HALF = {
    **dict.fromkeys(list(FLOAT32)[:3], both(1.1, 1.3)),
    **{shape: FLOAT32[shape] for shape in list(FLOAT32)[3:]},
}
OTHERS = (
    *((7, 33, 65, 5), (100, 300, 200, 2), (513, 257, 129, 4), (2048, 64, 64, 8)),
    *((16, 1024, 1024, 16), (4096, 256, 256, 2)),
)
TOKENS = {(32, 64): both(2.5, 3.0), (32, 256): both(2.0, 2.2)}
ONE = ((256, 512, 512, 3), (1024, 1024, 1024, 3))
OP_ITSELF = 2**18  # K O I up to which the op is measured without the Python around it, too


def manifold_linear(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """Each sample has its own condition."""
    goals = FLOAT32 if dtype == torch.float32 else HALF
    shapes = goals | dict.fromkeys(OTHERS, both())
    if quick:
        shapes = {(8, 16, 24, 3): both(), (7, 33, 65, 5): both()}
    for B, I, O, K in shapes:
        yield group("manifold_linear", (B, None, I, O, K), dtype, shapes[B, I, O, K])
        if (B, I, O, K) in goals or (quick and B == 8):
            yield group("manifold_linear", (B, None, I, O, K), dtype, shapes[B, I, O, K], FIXED)


def tokens(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """The T tokens of a sample share its condition."""
    if quick:
        yield group("tokens", (4, 5, 16, 24, 3), dtype, both())
        return
    for (B, T), goals in TOKENS.items():
        for gradients in (ALL, FIXED):
            yield group("tokens", (B, T, 512, 512, 3), dtype, goals, gradients)
    yield group("tokens", (8, 16, 512, 512, 3), dtype, both())


def one_condition(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """One condition for the whole batch."""
    goals = both(2.0 if dtype == torch.float32 else 1.3)
    for B, I, O, K in [(8, 16, 24, 3)] if quick else ONE:
        yield group("one_condition", (B, None, I, O, K), dtype, both() if quick else goals)


def linear_work(
    B: int, T: int, I: int, O: int, K: int, plain: float, folds: float, bytes_each: int
) -> dict[str, Work]:
    """The work of a linear op.

    Args:
        B: Samples.
        T: Tokens.
        I: Inputs.
        O: Outputs.
        K: Basis points.
        plain: How many times the operations of a plain layer it needs.
        folds: How many weights are folded.
        bytes_each: Of an element.
    """
    basis, rows = K * O * I, B * T * (I + O)
    product = (B * T, round(plain * I), O)
    forward = 2 * (plain * B * T * O * I + folds * basis)
    moved = bytes_each * (basis + rows)
    # Two more products; P, x and g read once more, dP and dx written.
    backward = Work(3 * forward, moved + bytes_each * (2 * basis + rows + B * T * I), product)
    return {FORWARD: Work(forward, moved, product), BACKWARD: backward}


def group(
    bench: str,
    sizes: tuple[int, int | None, int, int, int],
    dtype: torch.dtype,
    goals: Goals,
    gradients: tuple[str, ...] = ALL,
) -> Group:
    """The cases of B, T (None for no tokens), I, O and K."""
    shape = {n: size for n, size in zip("BTIOK", sizes, strict=True) if size is not None}
    fixed = gradients == FIXED
    return Group(
        bench,
        shape,
        dtype,
        {BACKWARD: goals[BACKWARD]} if fixed else goals,
        partial(_build, sizes, dtype, gradients, bench == "one_condition"),
        "c fixed" if fixed else "",
    )


def _build(
    sizes: tuple[int, int | None, int, int, int],
    dtype: torch.dtype,
    gradients: tuple[str, ...],
    one: bool,
    device: torch.device,
) -> Problem:
    B, T, I, O, K = sizes
    draw = Draw(dtype, device)
    middle = () if T is None else (T,)
    basis = draw.normal(K, O, I)
    operands = {
        "input": draw.normal(B, *middle, I),
        "basis": basis,
        "coeff": draw.coeff(K) if one else draw.coeff(B, K),
    }
    grad_output = draw.normal(B, *middle, O)
    ours = [Variant("neuromod_ext", public("manifold_linear"), "ours")]
    if not one and T is None and basis.numel() <= OP_ITSELF and _ops.EXTENSION:
        ours.append(Variant("the op itself", _op, "op"))
    others = peers.one_condition_peers(basis) if one else peers.linear_peers(B, basis)
    T = T or 1
    plain, folds = (1, 1) if one else (K, 0) if K * T <= K + T else (1, B)
    return Problem(
        operands,
        [*ours, *others, PLAIN],
        partial(expect_linear, operands, grad_output, gradients),
        linear_work(B, T, I, O, K, plain, folds, basis.element_size()),
        grad_output,
        gradients,
    )


def _op(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    return torch.ops.neuromod_ext.manifold_linear(input, basis, coeff)


def _plain(input: Tensor, basis: Tensor, **_: Tensor) -> Tensor:
    return F.linear(input, basis)


PLAIN = Variant("plain layer", _plain, "plain", {"basis": FIRST})
