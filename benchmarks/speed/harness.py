"""How time is measured: variants in turns, in one run, each judged by its median.

A machine's speed drifts with its clock, its temperature and its neighbours. So the variants of a
case take turns, in an order drawn anew for each round, and what drifts hits them all alike.
"""

from __future__ import annotations

import gc
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]
Clock = Callable[[], float]

BLOCK_SECONDS = 2e-4  # shorter calls are timed in blocks of several
SLOW = 20  # times the fastest: from there on a few rounds tell enough
FEW_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 3, 11, 301
LONG_SECONDS, LEAST_LONG_ROUNDS = 1.0, 5  # of a round


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over the rounds of a run.

    Attributes:
        median: Half of the rounds took less.
        low: A fifth took less.
        high: A fifth took more.
        rounds: How many rounds there were.
        calls: How many calls were timed at once in each.
    """

    median: float
    low: float
    high: float
    rounds: int
    calls: int

    @classmethod
    def of(cls, samples: list[float], calls: int) -> Timing:
        """Summarise the seconds of each round."""
        low, median, high = (float(q) for q in np.quantile(samples, (0.2, 0.5, 0.8)))
        return cls(median, low, high, len(samples), calls)


class Timer(Protocol):
    """Makes so many calls; returns the seconds of all, the device's work included."""

    def __call__(self, call: Call, calls: int) -> float:
        """Time a block."""


class HostTimer:
    """The host's clock, where a call returns when its work is done."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Call, calls: int) -> float:
        """Time a block."""
        start = self.clock()
        for _ in range(calls):
            call()
        return self.clock() - start


class CudaTimer:
    """CUDA events around a block, on the current stream, which begins with an empty L2 cache.

    Later calls of a block find in L2 what the earlier left, as do those of peers and probes.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call, calls: int) -> float:
        """Time a block."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def is_lost(device: torch.device) -> bool:
    """Whether a kernel has failed: all that this process asks of the GPU then fails, too."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def timer_for(device: torch.device) -> Timer:
    """The timer that fits a device."""
    return CudaTimer() if device.type == "cuda" else HostTimer()


def card() -> str:
    """The GPU's name, as part of a file's."""
    return in_file_name(torch.cuda.get_device_name())


def in_file_name(machine: str) -> str:
    """A machine's name, as part of a file's: "NVIDIA H100 80GB HBM3" is "h100-80gb-hbm3"."""
    words = re.findall("[a-z0-9]+", re.sub(r"\(\w+\)", "", machine.lower()))
    return "-".join(word for word in words if word != "nvidia")


@dataclass(frozen=True)
class Block:
    """What a round runs of a variant or of a probe.

    Attributes:
        time: Makes so many calls; returns the seconds of one.
        estimate: Seconds of one call in the warm-up.
        calls: How many calls a round makes.
        probe: It measures a limit, so that its speed does not make variants slow.
    """

    time: Callable[[int], float]
    estimate: float
    calls: int = 1
    probe: bool = False

    def run(self) -> float:
        """What a round takes by the call."""
        return self.time(self.calls)


def warm_up(call: Call, timer: Timer) -> Block:
    """The block of a call: called until warm, of as many calls as last BLOCK_SECONDS.

    Unless calls are long, each round of it begins with one that is not timed: it finds caches and
    memory as another variant left them, those that follow as in a loop of their own.
    """
    seconds = timer(call, 1)
    if seconds < LONG_SECONDS:
        seconds = min(seconds, timer(call, 1))
    calls = 1
    while seconds * calls < BLOCK_SECONDS:
        calls = max(calls + 1, math.ceil(1.1 * BLOCK_SECONDS / max(seconds, 1e-8)))
        seconds = min(seconds, timer(call, calls) / calls)

    def time(calls: int) -> float:
        if seconds < LONG_SECONDS:
            call()
        return timer(call, calls) / calls

    return Block(time, seconds, calls)


def equally_long(blocks: Mapping[str, Block]) -> dict[str, Block]:
    """The blocks, of as many calls as the longest has; probes and slow variants as they are."""
    estimates = {name: block.estimate for name, block in blocks.items()}
    most = max(block.calls for block in blocks.values() if not block.probe)
    return {
        name: block if block.probe or _slow(name, estimates, blocks) else replace(block, calls=most)
        for name, block in blocks.items()
    }


def interleave(
    blocks: Mapping[str, Block],
    budget: float,
    always: str = "",
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Run all blocks in turns until the budget is spent.

    Args:
        blocks: What takes turns, by name.
        budget: Seconds for all; more where the least number of rounds takes more.
        always: The one that takes part in every round, even if it is slow.
        clock: Tells when the budget is spent.
    """
    samples: dict[str, list[float]] = {name: [] for name in blocks}
    order, shuffle = list(blocks), random.Random(0).shuffle
    with _no_garbage_collection():
        start, done, least = clock(), 0, LEAST_LONG_ROUNDS
        while done < least or (done < MOST_ROUNDS and clock() - start < budget):
            shuffle(order)  # else one would always find the caches as the same other left them
            for name in order:
                samples[name].append(blocks[name].run())
            done += 1
            if done == FEW_ROUNDS:
                seconds = {name: min(samples[name]) for name in order}
                order = [
                    name for name in order if name == always or not _slow(name, seconds, blocks)
                ]
                if sum(seconds[name] * blocks[name].calls for name in order) <= LONG_SECONDS:
                    least = LEAST_ROUNDS
    return {name: Timing.of(taken, blocks[name].calls) for name, taken in samples.items()}


def _slow(name: str, seconds: Mapping[str, float], blocks: Mapping[str, Block]) -> bool:
    """Whether a variant takes SLOW times the fastest."""
    fastest = min(seconds[other] for other, block in blocks.items() if not block.probe)
    return not blocks[name].probe and seconds[name] > SLOW * fastest


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
