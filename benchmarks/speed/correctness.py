"""What results should be: einsums in float64 on the same operands, and how far off one may be.

An element is a sum of products; S is the sum of their magnitudes, n the number of terms on the
longest path of additions, u the unit round-off of the result's dtype. Exact products summed in
float32 and rounded once are within

.. math:: 4 u S + n 2^{-24} S,

and so are those of a weight that was folded and rounded before. The library must be. A peer may
miss it by SLACK, with the operands' u for every result, since in half precision it may round every
intermediate. For long sums the bound is wide, so the norm of the whole error is bounded, too.
Of large results a random part is checked, first and last elements always in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SLACK = 16.0
NORM = 2.0**-6  # of the error's Euclidean norm to the result's
MOST = 64  # indices of a dimension that are checked


@dataclass(frozen=True)
class Expected:
    """What a result should be.

    Attributes:
        value: The exact result, float64, at the indices checked.
        scale: S, likewise.
        terms: n.
        chosen: The indices checked, by dimension; all where there are none.
        stored: The dtype in which the library's kernels store it, where that is not the operands'.
    """

    value: Tensor
    scale: Tensor
    terms: int
    chosen: Mapping[int, Tensor]
    stored: torch.dtype | None = None

    def error(self, got: Tensor, dtype: torch.dtype) -> float:
        """The largest error in units of what is allowed, infinite where a result is not finite.

        Args:
            got: The whole result.
            dtype: Its unit round-off is u.
        """
        for dim, index in self.chosen.items():
            got = got.index_select(dim, index)
        if got.shape != self.value.shape:
            return math.inf
        if not got.numel():
            return 0.0
        error = (got.double() - self.value).abs()
        bound = (4 * UNIT[dtype] + self.terms * 2.0**-24) * self.scale
        ratio = (error / bound.clamp_min(1e-300)).max()
        of_norm = error.norm() / (NORM * self.value.norm()).clamp_min(1e-300)
        return float(torch.stack((ratio, of_norm)).nan_to_num(math.inf, math.inf).max())

    def plus(self, whole: Tensor) -> Expected:
        """Of the sum with a tensor."""
        for dim, index in self.chosen.items():
            whole = whole.index_select(dim, index)
        part = whole.double()
        return replace(self, value=self.value + part, scale=self.scale + part.abs())


def expect(
    equation: str,
    operands: Sequence[Tensor],
    terms: int,
    magnitudes: Sequence[Tensor] | None = None,
    most: int = MOST,
    stored: torch.dtype | None = None,
) -> Expected:
    """The result of an einsum, and its S.

    Args:
        equation: As for ``torch.einsum``, which contracts operands from left to right.
        operands: Of any dtype.
        terms: n.
        magnitudes: What S is made of, if not the operands' absolute values.
        most: How many indices of each dimension are checked.
        stored: As in Expected.
    """
    inputs, output = equation.split("->")
    chosen = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        for letter, size in zip(letters, operand.shape, strict=True):
            if letter in output and size > most and letter not in chosen:
                chosen[letter] = choose(size, operand.device, most)

    def evaluate(values: Sequence[Tensor]) -> Tensor:
        parts = []
        for letters, part in zip(inputs.split(","), values, strict=True):
            for dim, letter in enumerate(letters):
                if letter in chosen:
                    part = part.index_select(dim, chosen[letter])
            parts.append(part.double())
        return torch.einsum(equation, *parts)

    with torch.no_grad():
        value = evaluate(operands)
        scale = evaluate([t.abs() for t in operands] if magnitudes is None else magnitudes)
    kept = {output.index(letter): index for letter, index in chosen.items()}
    return Expected(value, scale, terms, kept, stored)


def choose(size: int, device: torch.device, most: int = MOST) -> Tensor:
    """The first, the last, and random other indices; all if there are no more."""
    if size <= most:
        return torch.arange(size, device=device)
    inner = torch.randperm(size - 2, generator=torch.Generator().manual_seed(size))[: most - 2] + 1
    return torch.cat((torch.tensor([0, size - 1]), inner)).sort().values.to(device)


def expect_linear(
    operands: Mapping[str, Tensor], grad_output: Tensor, gradients: Sequence[str]
) -> dict[str, Expected]:
    """Output and gradients of y_b = Σ_k c_bk P_k x_b.

    Args:
        operands: ``input`` [B, I] or [B, T, I], ``basis`` [K, O, I] and ``coeff`` [B, K], or [K]
            for one condition.
        grad_output: Like the output.
        gradients: The operands whose gradients are wanted.
    """
    x, P, c, g = operands["input"], operands["basis"], operands["coeff"], grad_output
    tokens = "t" if x.dim() == 3 else ""
    T = x.shape[1] if tokens else 1
    B, (_, O, I), K = x.shape[0], P.shape, c.shape[-1]
    xs, gs, cs = f"b{tokens}i", f"b{tokens}o", "bk" if c.dim() == 2 else "k"
    results = {"output": expect(f"{xs},koi,{cs}->{gs}", (x, P, c), I + K, most=32)}
    if "input" in gradients:
        results["input"] = expect(f"{gs},koi,{cs}->{xs}", (g, P, c), O + K, most=32)
    if "basis" in gradients:
        results["basis"] = expect(f"{gs},{cs},{xs}->koi", (g, c, x), B * T + 1)
    if "coeff" in gradients:
        # That of one condition comes by the gradient of the folded weight, which is rounded.
        terms, stored = (O + I + T, torch.float32) if c.dim() == 2 else (B + O * I, None)
        results["coeff"] = expect(f"{xs},koi,{gs}->{cs}", (x, P, g), terms, most=16, stored=stored)
    return results


def expect_by_autograd(
    function: Callable[..., Tensor],
    operands: Mapping[str, Tensor],
    grad_output: Tensor,
    gradients: Sequence[str],
    terms: Mapping[str, int],
) -> dict[str, Expected]:
    """Output and gradients of any function that is linear in each operand, in whole.

    Its gradients at absolute values are the S of its gradients.
    """

    def evaluate(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        wide = {name: of(t.double()).requires_grad_() for name, t in operands.items()}
        output = function(**wide)
        wanted = [wide[name] for name in gradients]
        grads = torch.autograd.grad(output, wanted, of(grad_output.double())) if wanted else ()
        return [output.detach(), *grads]

    with torch.enable_grad():
        values, scales = evaluate(torch.clone), evaluate(torch.abs)
    return {
        name: Expected(value, scale, terms[name], {})
        for name, value, scale in zip(("output", *gradients), values, scales, strict=True)
    }


def pick(expected: Expected, columns: Tensor) -> Expected:
    """The expected entries of a [B, K] result at ``columns``, [B, L] of all B."""
    rows = expected.chosen.get(0)
    at = columns if rows is None else columns.index_select(0, rows)
    return replace(expected, value=expected.value.gather(1, at), scale=expected.scale.gather(1, at))
