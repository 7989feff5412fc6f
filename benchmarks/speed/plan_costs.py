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

from neuromod_ext import _C

K = 3


def seconds(run: Callable[[], object], rounds: int = 15) -> float:
    """Median time of a call."""
    run()
    times = []
    for _ in range(rounds):
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
    os.environ["NEUROMOD_PLAN"] = plan
    try:
        return seconds(lambda: run(x, basis, coeff)) / features**2
    finally:
        del os.environ["NEUROMOD_PLAN"]


def main() -> None:
    """Print a row for each dtype."""
    torch.set_num_threads(1)
    print("dtype      product    blend   stream     pack     read")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        product = statistics.median(_C.tile_seconds(name, 64, 32, 512, 20) for _ in range(15))
        product /= 64 * 32 * 512
        forward, backward = "manifold_linear", "manifold_linear_grad_input"
        blend = (per_element("fold", forward, dtype, (16, 32, 512)) / 16 - 32 * product) / K
        stream = per_element("stream", forward, dtype, (4, 1, 256)) / (4 * K)
        pack = per_element("expand", backward, dtype, (64, 1, 512)) / K - 64 * product
        read = per_element("stream", forward, dtype, (1, 1, 4096)) / K - stream
        row = (product, blend, stream, pack, read)
        print(f"{name:9}", *(f"{max(value, 0.0):8.1e}" for value in row))


if __name__ == "__main__":
    main()
