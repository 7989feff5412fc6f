"""interpolate_weights: a weight for each condition, or for one."""

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

ALL = ("basis", "coeff")
SHAPES = ((32, 512, 512, 3), (1, 4096, 4096, 3))


def interpolate_weights(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """W_b = Σ_k c_bk P_k."""
    for B, I, O, K in [(4, 8, 12, 3)] if quick else SHAPES:
        shape = {"B": B, "I": I, "O": O, "K": K}
        yield Group(
            "interpolate_weights", shape, dtype, both(), partial(problem, B, I, O, K, dtype)
        )


def problem(B: int, I: int, O: int, K: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """B weights of K basis points."""
    draw = Draw(dtype, device)
    operands = {"basis": draw.normal(K, O, I), "coeff": draw.coeff(B, K)}
    grad_output = draw.normal(B, O, I)
    size, each = O * I, operands["basis"].element_size() * O * I
    # A product of so little depth is bound by memory: its operations set no limit. Backward reads g
    # and P once more and writes dP.
    work = {
        FORWARD: Work(2 * B * K * size, (B + K) * each),
        BACKWARD: Work(6 * B * K * size, (2 * B + 3 * K) * each),
    }
    return Problem(
        operands,
        [
            Variant("neuromod_ext", public("interpolate_weights"), "ours"),
            Variant("matmul", matmul),
            Variant("einsum", einsum),
            Variant("tensordot", tensordot),
            Variant("product + sum", product_sum, workspace=B * K * size * 4),
            Variant("accumulated", accumulated),
        ],
        partial(_expected, operands, grad_output),
        work,
        grad_output,
        ALL,
    )


def _expected(operands: dict[str, Tensor], grad_output: Tensor) -> dict[str, Expected]:
    P, c, g = operands["basis"], operands["coeff"], grad_output
    K, B = P.shape[0], c.shape[0]
    return {
        "output": expect("bk,koi->boi", (c, P), K),
        "basis": expect("bk,boi->koi", (c, g), B),
        "coeff": expect("boi,koi->bk", (g, P), P[0].numel(), stored=torch.float32),
    }


def matmul(basis: Tensor, coeff: Tensor) -> Tensor:
    """A product with the flattened basis points."""
    return (coeff.to(basis.dtype) @ basis.flatten(1)).unflatten(1, basis.shape[1:])


def einsum(basis: Tensor, coeff: Tensor) -> Tensor:
    """The formula as it stands."""
    return torch.einsum("bk,koi->boi", coeff.to(basis.dtype), basis)


def tensordot(basis: Tensor, coeff: Tensor) -> Tensor:
    """The formula, by the number of dimensions summed."""
    return torch.tensordot(coeff.to(basis.dtype), basis, 1)


def product_sum(basis: Tensor, coeff: Tensor) -> Tensor:
    """A product by broadcasting, and a sum."""
    return (coeff.to(basis.dtype)[..., None, None] * basis).sum(1)


def accumulated(basis: Tensor, coeff: Tensor) -> Tensor:
    """One basis point after another, by addcmul."""
    scale = coeff.to(basis.dtype)[..., None, None]
    out = scale[:, 0] * basis[0]
    for k in range(1, len(basis)):
        out = torch.addcmul(out, scale[:, k], basis[k])
    return out
