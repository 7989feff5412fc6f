"""What is measured: operands, the ways to compute one result from them, and that result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.correctness import Expected
from benchmarks.speed.limits import Work
from neuromod_ext import functional

Role = Literal["ours", "op", "peer", "plain"]
Result = Tensor | tuple[Tensor, ...]
Goals = Mapping[str, float]  # by direction

FORWARD, BACKWARD = "forward", "forward+backward"
GOAL = 0.95  # where no other is set: as fast as the best peer, less what timings scatter


class Unavailable(Exception):
    """The library has no such function."""


class Layout(NamedTuple):
    """An operand as a variant would rather store it; made before anything is timed."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


FIRST = Layout(lambda basis: basis[0].contiguous(), lambda weight: weight)  # of a plain layer


@dataclass(frozen=True)
class Variant:
    """One way to compute a problem's result.

    Attributes:
        name: Names it in tables.
        function: Of the problem's operands, by name.
        role: The library's function, its op without the Python around it, what else there is in
            PyTorch, or the plain layer without a condition (another result, for comparison).
        layouts: Of the operands it would store otherwise.
        workspace: Bytes of the largest array it makes, where that may be too many.
    """

    name: str
    function: Callable[..., Result]
    role: Role = "peer"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    workspace: int = 0


@dataclass
class Problem:
    """Operands, and what is to be computed from them.

    Attributes:
        operands: By name.
        variants: One of them of role "ours".
        expected: The expected results, by name: "output" and gradients by operand, or ``updated``.
        work: The least there is to do, by direction.
        grad_output: The output's gradient, for forward+backward.
        gradients: The operands whose gradients forward+backward yields.
        updated: The operands that are changed in place: they are the results.
    """

    operands: dict[str, Tensor]
    variants: list[Variant]
    expected: Callable[[], dict[str, Expected]]
    work: dict[str, Work]
    grad_output: Tensor | None = None
    gradients: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()

    @cached_property
    def expectation(self) -> dict[str, Expected]:
        """``expected``, computed once."""
        return self.expected()

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest of its operands, in which results are stored."""
        found = (t.dtype for t in self.operands.values() if t.is_floating_point())
        return min(found, key=lambda dtype: torch.finfo(dtype).bits)


@dataclass(frozen=True)
class Group:
    """The cases of one problem: each direction, at each number of threads.

    Attributes:
        bench: The name of the bench.
        shape: Sizes, by the letters of the formula.
        dtype: Of the operands.
        goals: By direction, how many times as fast as the best peer the library should be.
        build: Draws the problem on a device; raises Unavailable.
        note: What else sets it apart.
    """

    bench: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    goals: Goals
    build: Callable[[torch.device], Problem]
    note: str = ""

    @property
    def label(self) -> str:
        """The shape and the note, in short."""
        sizes = " ".join(f"{letter}{size}" for letter, size in self.shape.items())
        return f"{sizes} {self.note}".strip()


Bench = Callable[[torch.dtype, bool], Iterator[Group]]  # of a dtype, for the quick tier or not


class Draw:
    """Random operands, the same in each run."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Operands from the normal distribution."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def coeff(self, *shape: int) -> Tensor:
        """Coefficients, which are float32."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def metric_inverse(self) -> Tensor:
        """G⁻¹ of a quadratic Bézier curve, whose K is 3."""
        rows = [[9.0, -9.0, 3.0], [-9.0, 21.0, -9.0], [3.0, -9.0, 9.0]]
        return torch.tensor(rows, device=self.device)

    def turns(self, *shape: int) -> Tensor:
        """Phases, uniform in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device)


def public(name: str) -> Callable[..., Tensor]:
    """A function of the library, if this version has it."""
    function = getattr(functional, name, None)
    if function is None:
        raise Unavailable(f"neuromod_ext.functional has no {name}")
    return function


def both(forward: float = GOAL, backward: float | None = None) -> Goals:
    """Goals of both directions: two, or one for both."""
    return {FORWARD: forward, BACKWARD: forward if backward is None else backward}
