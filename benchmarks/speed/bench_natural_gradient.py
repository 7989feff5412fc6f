"""natural_gradient; natural_step_, which takes a step of it in place; and the peers of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.correctness import Expected, expect
from benchmarks.speed.limits import Work
from benchmarks.speed.peers import wide
from benchmarks.speed.problem import (
    FIRST,
    FORWARD,
    GOAL,
    Draw,
    Group,
    Problem,
    Variant,
    public,
)

LR = 1e-6  # small, since the steps of a whole run add up
SHAPES = ((256, 512, 512, 3), (1024, 1024, 1024, 3), (32, 4096, 4096, 3))


def natural_gradient(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """The gradient of the basis points in the metric: Σ_b (G⁻¹ c_b)_k g_b x_bᵀ."""
    return _groups("natural_gradient", dtype, quick, GOAL)


def natural_step(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """A step of it, in place: P_k −= η Σ_b (G⁻¹ c_b)_k g_b x_bᵀ."""
    return _groups("natural_step", dtype, quick, 2.0)


def _groups(bench: str, dtype: torch.dtype, quick: bool, goal: float) -> Iterator[Group]:
    for B, I, O, K in [(8, 16, 24, 3)] if quick else SHAPES:
        shape = {"B": B, "I": I, "O": O, "K": K}
        build = partial(_build, bench == "natural_step", B, I, O, K, dtype)
        yield Group(bench, shape, dtype, {FORWARD: GOAL if quick else goal}, build)


def _build(
    step: bool, B: int, I: int, O: int, K: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    ours = partial(public("natural_step_"), lr=LR) if step else public("natural_gradient")
    draw = Draw(dtype, device)
    operands = {
        "input": draw.normal(B, I),
        "grad_output": draw.normal(B, O),
        "coeff": draw.coeff(B, K),
        "metric_inverse": draw.metric_inverse(),
    }
    if step:
        operands["basis"] = draw.normal(K, O, I)
    elements = B * (I + O) + (2 if step else 1) * K * O * I
    work = Work(2 * B * K * O * I, elements * operands["input"].element_size(), (K * O, B, I))
    others = STEPS if step else GRADIENTS
    return Problem(
        operands,
        [Variant("neuromod_ext", ours, "ours"), *others],
        partial(_expected, operands),
        {FORWARD: work},
        updated=("basis",) if step else (),
    )


def _expected(operands: dict[str, Tensor]) -> dict[str, Expected]:
    x, g, c = (operands[name] for name in ("input", "grad_output", "coeff"))
    inverse, K, B = operands["metric_inverse"].double(), c.shape[1], len(x)
    dual, size = c.double() @ inverse.mT, c.double().abs() @ inverse.mT.abs()
    if "basis" not in operands:
        sizes = (g.abs(), size, x.abs())
        return {"output": expect("bo,bk,bi->koi", (g, dual, x), B + K + 1, sizes)}
    P = operands["basis"]
    change = expect("bo,bk,bi->koi", (g, -LR * dual, x), B + K + 3, (g.abs(), LR * size, x.abs()))
    return {"basis": change.plus(P)}


def _dual(coeff: Tensor, metric_inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """G⁻¹ c, [B, K]."""
    return (coeff @ metric_inverse.mT).to(dtype)


def _rows(grad_output: Tensor, dual: Tensor) -> Tensor:
    """(G⁻¹ c) ⊗ g, [B, K O]."""
    return (dual.unsqueeze(2) * grad_output.unsqueeze(1)).flatten(1)


def einsum(input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor) -> Tensor:
    """The formula as it stands, with dual coefficients."""
    dual = _dual(coeff, metric_inverse, input.dtype)
    return torch.einsum("bk,bo,bi->koi", dual, grad_output, input)


def preconditioned(
    input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> Tensor:
    """The ordinary gradient, then the metric."""
    grad = torch.einsum("bk,bo,bi->koi", coeff.to(input.dtype), grad_output, input)
    return torch.tensordot(metric_inverse.to(input.dtype), grad, 1)


def scaled(input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor) -> Tensor:
    """One product of (G⁻¹ c) ⊗ g with x."""
    dual = _dual(coeff, metric_inverse, input.dtype)
    return (_rows(grad_output, dual).mT @ input).unflatten(0, (dual.shape[1], -1))


def separate(input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor) -> Tensor:
    """K products."""
    dual = _dual(coeff, metric_inverse, input.dtype)
    return torch.stack([(c.unsqueeze(1) * grad_output).mT @ input for c in dual.unbind(1)])


def _subtracted(gradient: Callable[..., Tensor], basis: Tensor, **operands: Tensor) -> Tensor:
    return basis.add_(gradient(**operands), alpha=-LR)


def scaled_addmm(
    basis: Tensor, input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> Tensor:
    """One product of (G⁻¹ c) ⊗ g with x, subtracted as it is computed."""
    rows = _rows(grad_output, _dual(coeff, metric_inverse, input.dtype))
    return basis.flatten(0, 1).addmm_(rows.mT, input, alpha=-LR)


def wide_addmm(
    basis: Tensor, input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> Tensor:
    """One product of g with (G⁻¹ c) ⊗ x, subtracted from a basis stored as [O, K I]."""
    rows = _rows(input, _dual(coeff, metric_inverse, input.dtype))
    return basis.addmm_(grad_output.mT, rows, alpha=-LR)


def baddbmm(
    basis: Tensor, input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> Tensor:
    """A batched product over K, subtracted as it is computed."""
    dual = _dual(coeff, metric_inverse, input.dtype)
    rows = dual.mT.unsqueeze(2) * grad_output
    return basis.baddbmm_(rows.mT, input.expand(len(basis), *input.shape), alpha=-LR)


def separate_addmm(
    basis: Tensor, input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> Tensor:
    """K products, each subtracted as it is computed."""
    dual = _dual(coeff, metric_inverse, input.dtype)
    for P, c in zip(basis, dual.unbind(1), strict=True):
        P.addmm_((c.unsqueeze(1) * grad_output).mT, input, alpha=-LR)
    return basis


def _plain_gradient(input: Tensor, grad_output: Tensor, **_: Tensor) -> Tensor:
    return grad_output.mT @ input


def _plain_step(basis: Tensor, input: Tensor, grad_output: Tensor, **_: Tensor) -> Tensor:
    return basis.addmm_(grad_output.mT, input, alpha=-LR)


GRADIENTS = [
    Variant("einsum", einsum),
    Variant("gradient, then metric", preconditioned),
    Variant("scaled", scaled),
    Variant("separate", separate),
    Variant("plain layer", _plain_gradient, "plain"),
]
STEPS = [
    Variant("einsum, add", partial(_subtracted, einsum)),
    Variant("gradient, then metric, add", partial(_subtracted, preconditioned)),
    Variant("scaled, addmm", scaled_addmm),
    Variant("scaled, addmm, own layout", wide_addmm, layouts={"basis": wide(3)}),
    Variant("baddbmm", baddbmm),
    Variant("separate, addmm", separate_addmm),
    Variant("plain layer", _plain_step, "plain", {"basis": FIRST}),
]
