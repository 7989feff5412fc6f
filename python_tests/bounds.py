r"""How far a kernel may be from the exact result: derived from its arithmetic, not tuned.

An element is a sum of products, :math:`y = \sum_i a_i b_i c_i`. Let u be the unit round-off of the
result's dtype, e that of the accumulator (2⁻²⁴; 2⁻⁵³ for float64 operands) and

.. math:: S = \sum_i |a_i| |b_i| |c_i|.

A kernel reads exact operands, and a term passes through at most n + 2 roundings of the accumulator
(to multiply twice, and to add), n the number of summed terms on the longest path (I + K in the
forward pass: I additions to form a basis point's product, K to mix them, or the other way round;
about O + K in grad_input; B T + 1 in grad_basis; about O + I + T in grad_coeff, and what partial
sums add is in linear_entries.py). Each changes the term by a factor within 1 ± e, so they miss y by
no more than (n + 2) e S to first order, whatever the order of the sums. Storing the result rounds
once more, by u |y| <= u S. Where u > e, one factor is rounded to the operands' dtype before the
product, by another u S: c g in grad_basis, or, in plan fold of the forward pass and of grad_input,
the sample's blended weight, by u sum_k |c_k| |P_k| |x| = u S. Since e <= u,

.. math:: |\text{error}| \le 4 u S + n e S.

Matrix units (AMX) flush denormal numbers to zero. That moves each operand, and each product c g or
blended weight, by less than t, the smallest normal number of its dtype; so at most by S' - S, where
S' is S with every such magnitude enlarged by t; the result moves by t. That is the floor

.. math:: 2 (S' - S) + 4 t,

doubled to cover the terms of second order; it matters only near zero, and for float16.

The oracle works in float64, and for float64 operands in numpy's extended precision, so its own
error is part of the first-order slack.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sampling import name_of
from torch import Tensor

Array = NDArray[np.floating]
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


@dataclass(frozen=True)
class Expected:
    """What an op should yield, and what its bound is made of.

    Attributes:
        value: The exact result.
        scale: S.
        flushed: S'.
        terms: n.
        dtype: The result's.
        operands: The operands' dtype, which decides e and t.
    """

    value: Array
    scale: Array
    flushed: Array
    terms: int
    dtype: torch.dtype
    operands: torch.dtype
    accumulator: float | None = None  # e, where it is not that of the operands' dtype

    def bound(self) -> Array:
        e = self.accumulator or (2.0**-53 if self.operands == torch.float64 else 2.0**-24)
        floor = 2 * (self.flushed - self.scale) + 4 * torch.finfo(self.operands).tiny
        return 4 * UNIT[self.dtype] * self.scale + self.terms * e * self.scale + floor


def exact(t: Tensor) -> Array:
    """A tensor's values, in extended precision if it is float64."""
    array = t.detach().cpu().double().numpy()
    return array.astype(np.longdouble) if t.dtype == torch.float64 else array


@dataclass(frozen=True)
class Pass:
    """One evaluation of a formula: of the result, of S, or of S'.

    Attributes:
        minus: The sign of what is subtracted: +1 where magnitudes add up.
        tiny: What a product stored in the operands' dtype is enlarged by.
    """

    minus: int
    tiny: float


def expect(
    formula: Callable[..., Array],
    operands: list[Tensor],
    terms: int,
    result: torch.dtype,
    dtype: torch.dtype,
    accumulator: float | None = None,
) -> Expected:
    """Evaluate ``formula(pass, *operands)`` on the operands, their magnitudes, and those plus t."""
    tiny = float(torch.finfo(dtype).tiny)
    values = [exact(t) for t in operands]
    magnitudes = [np.abs(v) for v in values]
    with np.errstate(all="ignore"):
        value = formula(Pass(-1, 0.0), *values)
        scale = formula(Pass(1, 0.0), *magnitudes)
        flushed = formula(Pass(1, tiny), *(m + tiny for m in magnitudes))
    return Expected(value, scale, flushed, terms, result, dtype, accumulator)


def check(got: Tensor, want: Expected, case: object) -> None:
    """``got`` has the dtype and shape of ``want``, is dense, and is within the bound everywhere."""
    assert got.dtype == want.dtype, f"{case}: dtype {name_of(got.dtype)}, not {name_of(want.dtype)}"
    assert tuple(got.shape) == want.value.shape, f"{case}: shape {list(got.shape)}"
    error = np.abs(exact(got) - want.value)
    bound = want.bound()
    if not (error <= bound).all():  # a NaN on either side fails, too
        bad = ~(error <= bound)
        first = tuple(int(i[0]) for i in np.nonzero(bad))
        raise AssertionError(
            f"{case}: {bad.sum()} of {bad.size} elements beyond the bound; at {list(first)} got "
            f"{got[first].item()}, expected {float(want.value[first])}, "
            f"error {float(error[first]):.3g}, bound {float(bound[first]):.3g}"
        )
