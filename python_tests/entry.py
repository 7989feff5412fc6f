"""What the tests know of an op, and what the formulas of all ops share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from bounds import Array, Expected
from sampling import Draw
from torch import Tensor


@dataclass
class Call:
    """Arguments of one call, tensors by position and others by name."""

    tensors: list[Tensor | None]
    others: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Call":
        return Call([None if t is None else function(t) for t in self.tensors], self.others)


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: As in ``neuromod_ext._ops.NAMES``.
        draw: Arguments whose sizes multiply to at most the given number.
        large: Arguments large enough for several threads.
        oracle: What the call yields: for a mutating op its operands afterwards, else its results.
        mutates: Positions of the operands that it changes.
        differentiable: Whether autograd knows its derivative.
        dtypes: Dtypes of its operands.
        plan: The plan that the CPU's kernel takes for a call, if it has plans; ``oracle`` then has
            an argument of that name, which says in what order to sum.
        lists: How the arguments are put together of a call's tensors, where some are lists.
        pads: Whether the CPU's kernel pads the depth of half types' products, by whatever plan.
    """

    name: str
    draw: Callable[[Draw, int], Call]
    large: Callable[[Draw], Call]
    oracle: Callable[..., list[Expected]]
    mutates: tuple[int, ...] = ()
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    plan: Callable[[Call], str] | None = None
    lists: Callable[[list[Tensor | None]], list[Any]] = list
    pads: bool = False

    def run(self, function: Callable[..., Any], call: Call) -> list[Tensor]:
        out = function(*self.lists(call.tensors), **call.others)
        if not self.mutates:
            return list(out) if isinstance(out, tuple) else [out]
        assert out is None
        return [call.tensors[i] for i in self.mutates if call.tensors[i] is not None]

    def expected(self, call: Call, plan: str | None = None) -> list[Expected]:
        order = {} if plan is None else {"plan": plan}
        return self.oracle(*call.tensors, **call.others, **order)


def einsum(equation: str, *operands: Array) -> Array:
    """All products first, then their sum; numpy's own takes a factor that is common to terms out.

    It matters to infinities only.
    """
    terms, result = equation.split("->")
    letters = result + "".join(dict.fromkeys(c for c in terms if c not in result + ","))
    product = 1
    for names, t in zip(terms.split(","), operands, strict=True):
        t = t.transpose([names.index(c) for c in letters if c in names])
        product = product * t[tuple(slice(None) if c in names else None for c in letters)]
    return product.sum(tuple(range(len(result), len(letters))))


def rows(t: Array) -> Array:
    return t.reshape(t.shape[0], int(np.prod(t.shape[1:])))
