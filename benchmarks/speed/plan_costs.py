"""Measure the constants of the cost model: ``python -m benchmarks.speed.plan_costs``.

Prints the rows of the table in ``csrc/manifold_linear/manifold_linear_plan.cpp``, in seconds per
element on one thread. Each constant is what a forced plan takes on a problem that it dominates,
less what the model says of the rest.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

import neuromod_ext  # noqa: F401  (registers the ops)

K = 3


def seconds(run: Callable[[], object], rounds: int = 15) -> float:
    """Median time of a call, after something else."""
    run()
    times = []
    other = torch.randn(1 << 20)
    for _ in range(rounds):
        other.sum()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def per_element(plan: str, op: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """Time of a forced plan for [batch, tokens, features], by element of one basis point."""
    batch, tokens, features = shape
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(batch, tokens, features).to(dtype)
    basis = torch.randn(K, features, features).to(dtype)
    coeff = torch.randn(batch, K, dtype=accumulation)
    run = getattr(torch.ops.neuromod_ext, op).default
    operands: tuple[object, ...] = (x, basis, coeff)
    if op == "manifold_linear_backward":  # of basis and coeff
        operands = (x, x, basis, coeff, None, [False, True, True, False])
    os.environ["NEUROMOD_PLAN"] = plan
    try:
        return seconds(lambda: run(*operands)) / features**2
    finally:
        del os.environ["NEUROMOD_PLAN"]


def row(dtype: torch.dtype) -> dict[str, float]:
    """The constants of a dtype, by their names in the table."""

    def per(plan: str, batch: int, tokens: int, features: int = 512, op: str = "") -> float:
        return per_element(plan, f"manifold_linear{op}", dtype, (batch, tokens, features))

    cost = {"product": (per("expand", 512, 1) - per("expand", 256, 1)) / (256 * K)}
    for plan, key in (("fold", "fold"), ("fold_gemm", "gemm")):
        cost[key] = (per(plan, 4, 512) - per(plan, 4, 256)) / (4 * 256)
    for op, key in (("", "blend"), ("_backward", "spread")):
        of_sample = (per("fold", 64, 16, op=op) - per("fold", 16, 16, op=op)) / 48
        cost[key] = (of_sample - 16 * cost["fold"]) / K
    call = per("fold_gemm", 64, 16, 32) * 32**2 / 64
    turn = per("fold_gemm", 16, 64) / 16 - 64 * cost["gemm"] - K * cost["blend"]
    cost["turn"] = turn - 2 * call / 512**2
    cost["dots"] = per("stream", 12, 1, 256) / (12 * K * 1.25)  # ends take a quarter more
    cost["stream"] = per("stream", 4, 1, 256, op="_backward") / (4 * K * 4)  # four of its six
    cost["pack"] = per("expand", 64, 1, op="_grad_input") / K - 64 * cost["product"]
    cost["read"] = per("stream", 1, 1, 4096) / K - cost["dots"]
    cost["call"] = call
    cost["start"] = 32**2 * (per("expand", 8, 1, 32) - per("expand_gemm", 8, 1, 32))
    gradient = per("fold", 4, 1, 1024, op="_backward") - 4 * (K * cost["spread"] + cost["fold"])
    cost["once"] = gradient / K - cost["read"]
    for op, key in (("", "turned"), ("_grad_input", "packed")):
        cost[key] = per("expand_gemm", 64, 1, op=op) / K - 64 * cost["gemm"]
    return cost


def main() -> None:
    """Print a row for each dtype."""
    torch.set_num_threads(1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        cost = row(dtype)
        if dtype == torch.float64:
            print(f"{'dtype':14}", *(f"{name:>8}" for name in cost))
        print(f"{dtype!s:14}", *(f"{max(value, 0.0):8.1e}" for value in cost.values()))


if __name__ == "__main__":
    main()
