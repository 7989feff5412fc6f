"""The speed stage: ``python -m benchmarks.gpu.bench``; the benches of benchmarks/speed on a GPU.

The cases stand in the order of their weight, since a machine may be lent for minutes only. Each is
in the JSON as soon as it is measured, and the next run goes on from there; so does a fresh process
where a kernel fails, which takes the GPU from this one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.speed import (
    bench_fly_hash,
    bench_interpolate_weights,
    bench_manifold_conv,
    bench_manifold_metric,
    bench_manifold_step,
    figure,
    report,
)
from benchmarks.speed.bench_manifold_linear import FIXED, group
from benchmarks.speed.harness import card, is_lost
from benchmarks.speed.measure import Options
from benchmarks.speed.problem import FORWARD, GOAL, Group, both
from benchmarks.speed.results import Results
from benchmarks.speed.runner import Plan, run

RESULTS = Path("benchmarks/results")
SECONDS = 0.3  # for the rounds of each case
COMPILED = ("manifold_linear", "tokens")  # in bfloat16, where the goal is to be faster than peers
# Samples, inputs, outputs, basis points, and how many times as fast as the best peer
DENSE = {
    (4096, 4096, 4096, 3): GOAL,
    (1024, 1024, 1024, 3): 1.5,
    (256, 512, 512, 3): 2.0,
    (64, 128, 128, 3): 3.0,
    (16, 4096, 4096, 3): GOAL,
    (1, 4096, 4096, 3): GOAL,
}


def groups(dtype: torch.dtype) -> Iterator[Group]:
    """The cases of one dtype."""
    for (B, I, O, K), goal in DENSE.items():
        yield group("manifold_linear", (B, None, I, O, K), dtype, both(goal))
    yield group("tokens", (64, 256, 1024, 1024, 3), dtype, both(1.5))
    sizes = {"B": 64, "C": 64, "O": 64, "H": 32, "k": 3, "stride": 1, "pad": 1}
    build = partial(bench_manifold_conv.problem, *sizes.values(), dtype)
    yield Group("manifold_conv", sizes | {"K": 3}, dtype, both(2.0), build)
    for size in (4096 * 4096, 512 * 512):
        for metric in (True, False):
            build = partial(bench_manifold_step.problem, size, metric, dtype)
            goals, note = {FORWARD: 3.0 if metric else GOAL}, "" if metric else "no metric"
            yield Group("manifold_step", {"K": 3, "n": size}, dtype, goals, build, note)
    for B, I, O, K in ((32, 512, 512, 3), (256, 512, 512, 3), (1, 4096, 4096, 3)):
        build = partial(bench_interpolate_weights.problem, B, I, O, K, dtype)
        yield Group("interpolate_weights", {"B": B, "I": I, "O": O, "K": K}, dtype, both(), build)
    for B in (1024, 64):
        I, H, O = 784, 7840, 10
        build = partial(bench_fly_hash.problem, B, I, H, O, dtype)
        yield Group("fly_readout", {"B": B, "I": I, "H": H, "O": O}, dtype, both(), build)
    for N, K in ((1024, 3), (1_000_000, 3)):
        if dtype == torch.float32:
            build = partial(bench_manifold_metric.problem, N, K)
            yield Group("manifold_metric", {"N": N, "K": K}, dtype, both(), build)
    yield group("manifold_linear", (1024, None, 1024, 1024, 3), dtype, both(1.5), FIXED)


def is_compiled(group: Group) -> bool:
    """Whether the fastest peer is measured under torch.compile, too, which takes seconds each."""
    named = group.dtype == torch.bfloat16 and group.bench in COMPILED and not group.note
    return named and max(group.goals.values()) > 1


def main(device: torch.device) -> int:
    """Measure what the JSON lacks; 1 if a result of the library is wrong."""
    settings = {"seconds": SECONDS, "compile": "bfloat16 " + ", ".join(COMPILED), "quick": False}
    results = Results(RESULTS / f"speed-cuda-{card()}.json", device, settings, fresh=False)
    for one in (each for dtype in (torch.bfloat16, torch.float32) for each in groups(dtype)):
        plan = Plan((), (), [1], False, device, Options(SECONDS, is_compiled(one)))
        for step in run(plan, [one], results, lambda name: None):
            if step.new:
                print(report.line(step.case), flush=True)
                if is_lost(device):
                    print("a kernel failed; a fresh process goes on with the next case", flush=True)
                    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.bench"])
    Console(width=report.WIDTH).print(report.table(results.record))
    print("\n".join([*report.notes(results.record), str(results.path)]), flush=True)
    if results.record["cases"]:
        figure.draw(results.record).savefig(results.path.with_suffix(".png"), dpi=150)
    return int(any(not case["summary"]["correct"] for case in results.record["cases"]))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("neuromod_ext: these times are those of a CUDA GPU, and torch finds none here")
    sys.exit(main(torch.device("cuda")))
