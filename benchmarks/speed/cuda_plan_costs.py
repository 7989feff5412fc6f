"""Measure CUDA's cost model: ``python -m benchmarks.speed.cuda_plan_costs``.

First the constants in ``csrc/manifold_linear/manifold_linear_cuda_plan.cpp``, by their names there;
then every plan of manifold_linear on a few problems, forced, beside what the model predicts of it.
A choice is good where the plan that the model takes is about as fast as the fastest.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.speed.harness import Call, Timer, card, timer_for, warm_up
from benchmarks.speed.results import machine
from neuromod_ext import _C

Json = dict[str, Any]
RESULTS = Path("benchmarks/results")
FORCED = "NEUROMOD_CUDA_PLAN"
ROUNDS = 7
HOPELESS = 15  # times the cheapest by prediction: such plans are not measured
PROBLEMS = [  # samples, tokens, basis points, outputs, inputs
    (4096, 1, 3, 4096, 4096),
    (1024, 1, 3, 1024, 1024),
    (256, 1, 3, 512, 512),
    (64, 1, 3, 128, 128),
    (16, 1, 3, 4096, 4096),
    (1, 1, 3, 4096, 4096),
    (64, 256, 3, 1024, 1024),
    (32, 64, 3, 512, 512),
]
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
LARGE = 4096  # rows and columns of the products that tell rates


def seconds(call: Call, timer: Timer) -> float:
    """Median time of a call."""
    block = warm_up(call, timer)
    return statistics.median(block.run() for _ in range(ROUNDS))


def constants(device: torch.device, timer: Timer, size: int = LARGE) -> dict[str, float]:
    """The constants that one can see from outside, in the units of the cost model."""
    few = torch.empty(16, device=device)
    found = {
        "kMemory": copied_bytes(4 * size * size, device, timer),  # 256 MiB each way
        "kL2": copied_bytes(size * size // 16, device, timer),  # 4 MiB each way
        "kLaunch": seconds(few.zero_, timer),
    }
    if device.type == "cuda":
        found["kProcessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found[f"gemm {name}"] = 2 * size**3 / product(size, size, dtype, device, timer)
    row = product(1, size, torch.bfloat16, device, timer)
    found["kGemmMemory"] = 2 * size * size / row
    found["kCall"] = product(16, 16, torch.bfloat16, device, timer)
    return found


def copied_bytes(count: int, device: torch.device, timer: Timer) -> float:
    """Bytes a second, read and written, in a copy of so many floats."""
    source, target = torch.empty(2, count, device=device)
    return 8 * count / seconds(partial(target.copy_, source), timer)


def product(rows: int, size: int, dtype: torch.dtype, device: torch.device, timer: Timer) -> float:
    """Seconds of torch's product of [rows, size] and [size, size]."""
    a, b = (torch.randn(n, size, device=device).to(dtype) for n in (rows, size))
    return seconds(partial(torch.mm, a, b, out=torch.empty_like(a)), timer)


def calls(ops: Any, problem: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Json:
    """What computes each pass of a problem, by the names of ``_C.explain``."""
    B, T, K, O, I = problem
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(B, T, I, device=device).to(dtype)
    g = torch.randn(B, T, O, device=device).to(dtype)
    basis = torch.randn(K, O, I, device=device).to(dtype)
    coeff = torch.randn(B, K, device=device, dtype=accumulation)
    all_four = (g, x, basis, coeff, None)
    backward = ops.manifold_linear_backward.default
    return {
        "forward": lambda: ops.manifold_linear(x, basis, coeff, None),
        "grad_input": lambda: ops.manifold_linear_grad_input(g, basis, coeff),
        "grad_basis": lambda: ops.manifold_linear_grad_basis(g, x, coeff),
        "grad_input + grad_coeff": lambda: backward(*all_four, [True, False, True, False]),
        "grad_basis + grad_coeff": lambda: backward(*all_four, [False, True, True, False]),
    }


def measured(
    ops: Any, problem: tuple[int, ...], dtype: torch.dtype, device: torch.device, timer: Timer
) -> Iterator[Json]:
    """A row for each pass: what each plan takes, and what was predicted, the cheapest first."""
    names = ("batch", "tokens", "num_basis", "out_features", "in_features")
    name = str(dtype).removeprefix("torch.")
    sizes = dict(zip(names, problem, strict=True))
    before = os.environ.pop(FORCED, None)
    try:
        predicted = _C.explain(device="cuda", dtype=name, **sizes)
        for pass_, call in calls(ops, problem, dtype, device).items():
            plans = {}
            for plan, cost in predicted[pass_]:
                if cost > HOPELESS * predicted[pass_][0][1]:
                    continue
                os.environ[FORCED] = plan
                plans[plan] = {"predicted": cost, "seconds": seconds(call, timer)}
            if plans:
                yield {"dtype": name, **sizes, "pass": pass_, "plans": plans}
    finally:
        os.environ.pop(FORCED, None)
        if before is not None:
            os.environ[FORCED] = before


def lost(row: Json) -> float:
    """How many times as long as the fastest plan the one takes that the model would take."""
    plans = list(row["plans"].values())
    return plans[0]["seconds"] / min(plan["seconds"] for plan in plans)


def table(rows: list[Json]) -> Table:
    """One line a pass: microseconds, measured and (predicted), of each plan."""
    sheet = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    sheet.add_column("problem", no_wrap=True)
    sheet.add_column("pass", no_wrap=True)
    sheet.add_column("µs, measured (predicted); the first is taken")
    sheet.add_column("taken / fastest", justify="right")
    for row in rows:
        sizes = "B{batch} T{tokens} K{num_basis} O{out_features} I{in_features}".format(**row)
        plans = ", ".join(
            f"{plan} {1e6 * its['seconds']:.0f} ({1e6 * its['predicted']:.0f})"
            for plan, its in row["plans"].items()
        )
        style = "red" if lost(row) > 1.2 else ""
        sheet.add_row(
            f"{row['dtype']} {sizes}", row["pass"], plans, f"{lost(row):.2f}", style=style
        )
    return sheet


def main(device: torch.device, ops: Any, path: Path, size: int = LARGE) -> int:
    """Measure all; the JSON holds what was measured so far."""
    timer, console = timer_for(device), Console(width=160)
    record: Json = {"environment": machine(device), "constants": constants(device, timer, size)}
    for name, value in record["constants"].items():
        console.print(f"{name:14} {value:.3g}")
    record["plans"] = rows = []
    for dtype in DTYPES:
        for problem in PROBLEMS:
            rows.extend(measured(ops, problem, dtype, device, timer))
            part = path.with_suffix(
                ".part"
            )  # whoever reads the file, or kills the run, finds it whole
            part.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(part, path)
    console.print(table(rows))
    console.print(str(path))
    return 0


if __name__ == "__main__":
    gpu = torch.device("cuda")
    if not torch.cuda.is_available():
        sys.exit("neuromod_ext: these costs are those of a CUDA GPU, and torch finds none here")
    sys.exit(main(gpu, torch.ops.neuromod_ext, RESULTS / f"plans-cuda-{card()}.json"))
