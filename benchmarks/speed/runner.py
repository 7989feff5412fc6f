"""All cases of a run, one after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.speed.bench_fly_hash import fly_readout
from benchmarks.speed.bench_interpolate_weights import interpolate_weights
from benchmarks.speed.bench_manifold_conv import manifold_conv
from benchmarks.speed.bench_manifold_linear import manifold_linear, one_condition, tokens
from benchmarks.speed.bench_manifold_linear_local import splines
from benchmarks.speed.bench_manifold_metric import manifold_metric
from benchmarks.speed.bench_manifold_step import manifold_step
from benchmarks.speed.bench_natural_gradient import natural_gradient, natural_step
from benchmarks.speed.bench_switch import mixed_batch, switch
from benchmarks.speed.harness import threads
from benchmarks.speed.measure import Options, measure
from benchmarks.speed.memory import settle_allocator
from benchmarks.speed.problem import Bench, Group, Unavailable
from benchmarks.speed.results import Json, Results

BENCHES: dict[str, Bench] = {
    bench.__name__: bench
    for bench in (
        *(manifold_linear, tokens, one_condition, splines, manifold_conv),
        *(interpolate_weights, natural_gradient, natural_step, manifold_step, manifold_metric),
        *(fly_readout, switch, mixed_batch),
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        benches: Names in BENCHES.
        dtypes: Names in DTYPES.
        threads: Numbers of threads.
        quick: Tiny shapes only.
        device: Where.
        options: How.
    """

    benches: Sequence[str]
    dtypes: Sequence[str]
    threads: Sequence[int]
    quick: bool
    device: torch.device
    options: Options

    def groups(self) -> list[Group]:
        """All problems."""
        return [
            group
            for bench in self.benches
            for dtype in self.dtypes
            for group in BENCHES[bench](DTYPES[dtype], self.quick)
        ]

    def keys(self, group: Group) -> list[Json]:
        """What tells the cases of a group apart, in the JSON."""
        return [
            {
                "bench": group.bench,
                "shape": dict(group.shape),
                "note": group.note,
                "dtype": str(group.dtype).removeprefix("torch."),
                "direction": direction,
                "threads": number,
            }
            for number in self.threads
            for direction in group.goals
        ]


class Step(NamedTuple):
    """A case of a run, and whether it was measured now; None where the library lacks the op."""

    case: Json | None
    new: bool


def run(
    plan: Plan, groups: Iterable[Group], results: Results, announce: Callable[[str], Any]
) -> Iterator[Step]:
    """Measure what ``results`` lacks, and add it; yield each case, those it had included.

    Args:
        plan: What to measure.
        groups: The plan's.
        results: What was measured before.
        announce: Is told the name of each case that is measured next.
    """
    settle_allocator()
    gc.freeze()  # what was imported: each later collection would search it in vain
    for group in groups:
        keys = plan.keys(group)
        cases = [results.find(key) for key in keys]
        problem = None
        if None in cases:
            try:
                problem = group.build(plan.device)
            except Unavailable as missing:
                entry = {name: keys[0][name] for name in ("bench", "shape", "note", "dtype")}
                results.skip(entry | {"reason": str(missing)})
        for key, case in zip(keys, cases, strict=True):
            new = case is None and problem is not None
            if new:
                announce(f"{group.bench} {group.label} {key['dtype']}")
                with threads(key["threads"]):
                    measured = measure(problem, key["direction"], plan.options)
                case = results.add(key | {"goal": group.goals[key["direction"]]} | measured)
            yield Step(case, new)
        del problem
        gc.collect()
    gc.unfreeze()
