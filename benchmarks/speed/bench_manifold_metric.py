"""manifold_metric: the Gram matrix of a batch's coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.correctness import Expected, expect
from benchmarks.speed.limits import Work
from benchmarks.speed.problem import (
    BACKWARD,
    FORWARD,
    Draw,
    Group,
    Problem,
    Variant,
    both,
    public,
)

SHAPES = ((1024, 3), (1024, 16))


def manifold_metric(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """G = Σ_n c_n c_nᵀ / N; coefficients are never in half precision."""
    if dtype == torch.float32:
        for N, K in [(16, 3)] if quick else SHAPES:
            shape, build = {"N": N, "K": K}, partial(problem, N, K)
            yield Group("manifold_metric", shape, dtype, both(), build)


def problem(N: int, K: int, device: torch.device) -> Problem:
    """N conditions of K coefficients."""
    draw = Draw(torch.float32, device)
    operands = {"coeff": draw.coeff(N, K)}
    grad_output = draw.coeff(K, K)
    work = {FORWARD: Work(2 * N * K * K, 4 * N * K), BACKWARD: Work(4 * N * K * K, 12 * N * K)}
    return Problem(
        operands,
        [
            Variant("neuromod_ext", public("manifold_metric"), "ours"),
            Variant("matmul", matmul),
            Variant("matmul, float64", matmul_wide),
            Variant("einsum", einsum),
        ],
        partial(_expected, operands["coeff"], grad_output),
        work,
        grad_output,
        ("coeff",),
    )


def _expected(coeff: Tensor, grad_output: Tensor) -> dict[str, Expected]:
    N, K = coeff.shape
    mean, g = coeff.double() / N, grad_output.double()
    sizes = (mean.abs(), g.abs() + g.mT.abs())
    return {
        "output": expect("nj,nk->jk", (coeff, mean), N + 1),
        "coeff": expect("nj,jk->nk", (mean, g + g.mT), K + 3, sizes),
    }


def matmul(coeff: Tensor) -> Tensor:
    """One product."""
    return coeff.mT @ coeff / len(coeff)


def matmul_wide(coeff: Tensor) -> Tensor:
    """One product in float64, as the library sums."""
    wide = coeff.double()
    return (wide.mT @ wide / len(coeff)).to(coeff.dtype)


def einsum(coeff: Tensor) -> Tensor:
    """The formula as it stands."""
    return torch.einsum("nj,nk->jk", coeff, coeff) / len(coeff)
