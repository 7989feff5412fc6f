"""What the machine can do, measured in turns with the variants: products, copies and reads.

A work of so many operations and bytes takes no less than the slower of a matrix product of as many
operations and a pass over as many bytes. The product is the faster of torch.mm (oneDNN, MKL or
cuBLAS) and, on the CPU, the tile product of the extension on a cached tile; the pass is the faster
of a copy and a read, both over as many bytes as the work's, so in the same cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.speed.harness import Block, Call, Timer, Timing, warm_up
from neuromod_ext import _ops

MOST_BYTES = 2**28  # more take as long by the byte
TILE = (64, 64, 512)  # rows, columns, depth
TILE_REPEATS = 64


@dataclass(frozen=True)
class Work:
    """The least there is to do, by the cheapest algorithm known.

    Attributes:
        flops: Multiplications and additions in matrix products.
        bytes: Operands read once and results written once.
        product: Rows, depth and columns of a matrix product of this kind; None if there is none.
    """

    flops: float
    bytes: float
    product: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Limit:
    """The least seconds of a work, and the probe that sets them."""

    seconds: float
    by: str


def probes(work: Work, dtype: torch.dtype, device: torch.device, timer: Timer) -> dict[str, Block]:
    """Probes by name, each of which tells the seconds of the whole work."""
    elements = max(int(min(work.bytes, MOST_BYTES)) // 8, 1)
    first, second = torch.ones(2, elements, device=device).unbind()
    passed = work.bytes / (8 * elements)
    found = {
        "copy": _probe(lambda: first.copy_(second), passed, timer),
        "read": _probe(lambda: torch.dot(first, second), passed, timer),
    }
    if work.product:
        rows, depth, columns = work.product
        left = torch.randn(rows, depth, device=device).to(dtype)
        right = torch.randn(depth, columns, device=device).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        multiplied = work.flops / (2 * rows * depth * columns)
        found["mm"] = _probe(lambda: torch.mm(left, right, out=out), multiplied, timer)
        if device.type == "cpu" and (tiles := _tiles(work, dtype)):
            found["tiles"] = tiles
    return found


def limit(timings: Mapping[str, Timing]) -> Limit:
    """The limit, from the probes' timings."""
    kinds = (("copy", "read"), ("mm", "tiles"))
    there = [[name for name in kind if name in timings] for kind in kinds]
    best = [min(names, key=lambda name: timings[name].median) for names in there if names]
    by = max(best, key=lambda name: timings[name].median)
    return Limit(timings[by].median, by)


def _probe(call: Call, factor: float, timer: Timer) -> Block:
    block = warm_up(call, timer)
    return Block(lambda calls: factor * block.time(calls), block.estimate, block.calls, probe=True)


def _tiles(work: Work, dtype: torch.dtype) -> Block | None:
    """The extension's product of one cached tile, on all threads at one's rate."""
    if not _ops.EXTENSION:
        return None
    from neuromod_ext import _C

    tile_seconds = getattr(_C, "tile_seconds", None)
    if tile_seconds is None:
        return None
    name = str(dtype).removeprefix("torch.")
    tiles = work.flops / (2 * math.prod(TILE) * torch.get_num_threads())
    estimate = TILE_REPEATS * tile_seconds(name, *TILE, TILE_REPEATS)
    return Block(
        lambda calls: tiles * tile_seconds(name, *TILE, calls), estimate, TILE_REPEATS, probe=True
    )
