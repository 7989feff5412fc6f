"""One case: its variants checked, their memory taken, then timed in turns with the limits."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.correctness import SLACK
from benchmarks.speed.harness import (
    LONG_SECONDS,
    SLOW,
    Block,
    Call,
    Timing,
    equally_long,
    interleave,
    is_lost,
    timer_for,
    warm_up,
)
from benchmarks.speed.limits import limit, probes
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.problem import BACKWARD, Problem, Result, Variant

MOST_WORKSPACE = 2**30  # bytes of one array
Json = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How cases are measured.

    Attributes:
        seconds: For the rounds of one.
        compile: Measure the fastest peer under ``torch.compile``, too.
    """

    seconds: float
    compile: bool


class Prepared:
    """A variant and its operands: the problem's own, unless it stores or changes them itself."""

    def __init__(self, variant: Variant, problem: Problem, direction: str) -> None:
        self.variant, self.problem, self.direction = variant, problem, direction
        self.gradients = problem.gradients if direction == BACKWARD else ()
        self.operands = {name: self._operand(name) for name in problem.operands}

    @property
    def call(self) -> Call:
        """What is timed."""
        return self._backward if self.direction == BACKWARD else self._forward

    def _operand(self, name: str) -> Tensor:
        operand = self.problem.operands[name].detach()
        if name in self.problem.updated:
            operand = operand.clone()
        if name in self.variant.layouts:
            operand = self.variant.layouts[name].to(operand)
        return operand.requires_grad_() if name in self.gradients else operand

    def _forward(self) -> Result:
        return self.variant.function(**self.operands)

    def _backward(self) -> tuple[Tensor, ...]:
        output = self.variant.function(**self.operands)
        wanted = [self.operands[name] for name in self.gradients]
        unused = self.variant.role == "plain"  # it has no coefficients
        grads = torch.autograd.grad(output, wanted, self.problem.grad_output, allow_unused=unused)
        return output, *grads

    def results(self) -> dict[str, Tensor]:
        """Make one call; its results, in the problem's layouts, or what it changed."""
        called = self.call()
        if self.problem.updated:
            found = {name: self.operands[name] for name in self.problem.updated}
        else:
            values = called if isinstance(called, tuple) else (called,)
            found = dict(zip(("output", *self.gradients), values, strict=True))
        layouts = self.variant.layouts
        return {
            name: layouts[name].back(value) if name in layouts else value
            for name, value in found.items()
            if value is not None
        }

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """The error of each result, in units of what is allowed."""
        found = {}
        for name, result in results.items():
            expected, dtype = self.problem.expectation[name], self.problem.dtype
            if self.variant.role != "peer":
                dtype = expected.stored or dtype
            found[name] = expected.error(result.detach(), dtype)
        return found


def measure(problem: Problem, direction: str, options: Options) -> Json:
    """Measure one case at the number of threads that torch has now."""
    with torch.set_grad_enabled(direction == BACKWARD):
        return _Case(problem, direction).measure(options)


class _Case:
    def __init__(self, problem: Problem, direction: str) -> None:
        self.problem, self.direction = problem, direction
        self.device = next(iter(problem.operands.values())).device
        self.timer = timer_for(self.device)
        self.records: dict[str, Json] = {}
        self.blocks: dict[str, Block] = {}

    def measure(self, options: Options) -> Json:
        for variant in self.problem.variants:
            self._try(variant)
        if is_lost(self.device):  # the first without a result says by what
            return self._record({}, {})
        if options.compile:
            self._try_compiled()
        work = self.problem.work[self.direction]
        limits = probes(work, self.problem.dtype, self.device, self.timer)
        ours = next(v.name for v in self.problem.variants if v.role == "ours")
        timings = {}
        if self.blocks:
            blocks = equally_long(self.blocks | limits)
            timings = interleave(blocks, options.seconds, always=ours)
        return self._record(timings, limits)

    def _record(self, timings: dict[str, Timing], limits: dict[str, Block]) -> Json:
        for name, record in self.records.items():
            if name in timings:
                record["seconds"] = asdict(timings[name])
        return {
            "variants": list(self.records.values()),
            "limits": {name: asdict(timings[name]) for name in limits if name in timings},
            "summary": summarise(self.records, timings, limits),
        }

    def _try(self, variant: Variant) -> None:
        """Check a variant, and make its block; a variant that cannot run says why."""
        record = self.records[variant.name] = {"name": variant.name, "role": variant.role}
        if variant.workspace > MOST_WORKSPACE:
            record["reason"] = f"would store an array of {variant.workspace / 2**30:.1f} GiB"
            return
        try:
            prepared = Prepared(variant, self.problem, self.direction)
            results: dict[str, Tensor] = {}
            first = self.timer(lambda: results.update(prepared.results()), 1)
            if variant.role != "plain":
                worst = max(prepared.errors(results).values())
                record["error"] = worst if worst < math.inf else None
                record["correct"] = worst <= (SLACK if variant.role == "peer" else 1.0)
            results.clear()
            fastest = min((block.estimate for block in self.blocks.values()), default=math.inf)
            slow = first > max(SLOW * fastest, LONG_SECONDS)
            record["peak_bytes"] = peak_bytes(prepared.call, self.device, slow)
            self.blocks[variant.name] = (
                Block(lambda calls: self.timer(prepared.call, calls) / calls, first)
                if slow
                else warm_up(prepared.call, self.timer)
            )
        except Exception as error:  # whatever a peer's kernel, or a compiler, may raise
            record["correct"] = False
            said = (str(error).strip().splitlines() or [""])[0]
            record["reason"] = f"{type(error).__name__}: {said[:160]}"

    def _try_compiled(self) -> None:
        """The fastest peer so far, compiled."""
        peers = {v.name: v for v in self.problem.variants if v.role == "peer"}
        able = [n for n in peers if n in self.blocks and self.records[n]["correct"]]
        if not able:
            return
        best = peers[min(able, key=lambda name: self.blocks[name].estimate)]
        torch._dynamo.reset()
        compiled = torch.compile(lambda **operands: best.function(**operands), dynamic=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._try(replace(best, name=f"compiled: {best.name}", function=compiled))


def summarise(
    records: dict[str, Json], timings: dict[str, Timing], limits: dict[str, Block]
) -> Json:
    """What a case comes to, by medians; null where it cannot be told.

    ``ratio`` is how many times as fast as the best correct peer the library is, ``ratio_low`` and
    ``ratio_high`` the same from the quantiles that are worst and best for it; ``of_limit`` the
    limit's time by the library's; ``of_plain`` the library's time by the plain layer's.
    """

    def of(role: str) -> list[str]:
        return [n for n, record in records.items() if record["role"] == role and n in timings]

    right = [name for name in of("peer") if records[name]["correct"]]
    best = min(right, key=lambda name: timings[name].median, default=None)
    summary: Json = dict.fromkeys(
        ("best_peer", "ratio", "ratio_low", "ratio_high", "of_limit", "limit", "of_plain")
    )
    summary["correct"] = all(r["correct"] for r in records.values() if r["role"] in ("ours", "op"))
    summary["best_peer"] = best
    if not of("ours") or not summary["correct"]:
        return summary
    ours = timings[of("ours")[0]]
    if best is not None:
        peer = timings[best]
        summary["ratio"] = peer.median / ours.median
        summary["ratio_low"], summary["ratio_high"] = peer.low / ours.high, peer.high / ours.low
    floor = limit({name: timings[name] for name in limits})
    summary["of_limit"], summary["limit"] = floor.seconds / ours.median, floor.by
    if of("plain"):
        summary["of_plain"] = ours.median / timings[of("plain")[0]].median
    return summary
