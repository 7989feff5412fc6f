"""manifold_linear_local: a curve with local support, where few coefficients are not zero."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed import peers
from benchmarks.speed.bench_manifold_linear import ALL, PLAIN, linear_work
from benchmarks.speed.correctness import Expected, expect_linear, pick
from benchmarks.speed.problem import Draw, Group, Problem, Variant, both, public

LOCAL = 2  # non-zero coefficients of PiecewiseLinear


def splines(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """``PiecewiseLinear(K, closed=True)``: each sample lies between two of K basis points."""
    shapes = ((256, 512, 512, 16), (1024, 512, 512, 16))
    for B, I, O, K in [(24, 16, 24, 5)] if quick else shapes:
        shape = {"B": B, "I": I, "O": O, "K": K}
        build = partial(_build, B, I, O, K, dtype)
        yield Group("splines", shape, dtype, both() if quick else both(3.0), build)


def _build(B: int, I: int, O: int, K: int, dtype: torch.dtype, device: torch.device) -> Problem:
    ours = public("manifold_linear_local")
    draw = Draw(dtype, device)
    position = draw.turns(B) * K
    fraction = position.frac()
    basis = draw.normal(K, O, I)
    operands = {
        "input": draw.normal(B, I),
        "basis": basis,
        "index": position.long(),
        "coeff": torch.stack((1 - fraction, fraction), 1),
    }
    grad_output = draw.normal(B, O)
    return Problem(
        operands,
        [
            Variant("neuromod_ext", ours, "ours"),
            *peers.local_peers(B, LOCAL, basis),
            PLAIN,
        ],
        partial(_expected, operands, grad_output),
        linear_work(B, 1, I, O, K, LOCAL, 0, basis.element_size()),
        grad_output,
        ALL,
    )


def _expected(operands: dict[str, Tensor], grad_output: Tensor) -> dict[str, Expected]:
    """Those of the dense problem, whose other coefficients are zero."""
    index, coeff, K = operands["index"], operands["coeff"], len(operands["basis"])
    dense = operands | {"coeff": peers.dense_coeff(index, coeff, K)}
    results = expect_linear(dense, grad_output, ALL)
    return results | {"coeff": pick(results["coeff"], peers.positions(index, coeff, K))}
