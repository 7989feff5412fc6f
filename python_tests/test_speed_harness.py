"""The speed benchmark's harness and limits, on a clock that the tests turn."""

import math
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import harness, limits, memory
from benchmarks.speed.harness import (
    Block,
    HostTimer,
    Timing,
    equally_long,
    interleave,
    warm_up,
)
from neuromod_ext import _ops

CPU = torch.device("cpu")


class FakeClock:
    """A clock that only the calls move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        """A call that takes ``seconds(i)`` the i-th time."""

        def call() -> None:
            self.now += seconds(self.log.count(name))
            self.log.append(name)

        return call


def test_quantiles() -> None:
    samples = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert Timing.of(samples, 7) == Timing(3.5, 2.0, 5.0, 6, 7)


def test_short_calls_are_timed_in_blocks() -> None:
    clock = FakeClock()
    timer = HostTimer(clock)
    for seconds in (1e-7, 1.9e-4, 2.1e-4, 0.5, 2.0):
        block = warm_up(clock.takes(str(seconds), lambda i, s=seconds: s), timer)
        assert block.estimate == pytest.approx(seconds)
        assert block.run() == pytest.approx(seconds)  # of one call
        before = len(clock.log)
        block.run()
        untimed = seconds < harness.LONG_SECONDS  # one call before the clock starts
        assert len(clock.log) - before == block.calls + untimed
        assert (
            (block.calls - 1) * seconds
            < 1.2 * harness.BLOCK_SECONDS
            <= 1.2 * block.calls * max(seconds, harness.BLOCK_SECONDS / block.calls)
        )
        if seconds >= harness.BLOCK_SECONDS:
            assert block.calls == 1


def test_variants_make_as_many_calls_as_each_other() -> None:
    """Reading the clock, and what a first call finds, then weigh on all alike."""
    slow, probe = Block(lambda calls: 1.0, 1.0), Block(lambda calls: 0.0, 1e-6, 64, probe=True)
    quick, ours = (Block(float, 1e-4 * calls, calls) for calls in (2, 1))
    blocks = equally_long({"slow": slow, "probe": probe, "quick": quick, "ours": ours})
    assert {name: block.calls for name, block in blocks.items()} == {
        "slow": 1,
        "probe": 64,
        "quick": 2,
        "ours": 2,
    }
    assert blocks["ours"].run() == 2.0


def test_variants_take_turns_and_are_summed_up() -> None:
    clock = FakeClock()
    timer = HostTimer(clock)

    def block(name: str, seconds: Callable[[int], float], estimate: float) -> Block:
        call = clock.takes(name, seconds)
        return Block(lambda calls: timer(call, 1), estimate)

    blocks = {
        "a": block("a", lambda i: 0.1 + 0.01 * (i % 2), 0.1),
        "b": block("b", lambda i: 0.2, 0.2),
        "slow": block("slow", lambda i: 2.1, 2.1),
    }
    timings = interleave(blocks, budget=6.3 + 15 * 0.3, clock=clock)
    assert timings["slow"].rounds == harness.FEW_ROUNDS
    assert timings["slow"].median == pytest.approx(2.1)
    rounds = timings["a"].rounds
    assert timings["b"].rounds == rounds == 15
    assert timings["a"].median == pytest.approx(0.1)
    assert timings["a"].high == pytest.approx(0.11)
    assert timings["b"] == Timing(pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2), 15, 1)
    quick_ones = [name for name in clock.log if name != "slow"]
    turns = [tuple(quick_ones[i : i + 2]) for i in range(0, 2 * rounds, 2)]
    assert set(turns) == {("a", "b"), ("b", "a")}  # each once a round, in changing order


@pytest.mark.parametrize(
    ("seconds", "budget", "rounds"),
    [
        (0.01, 0.0, harness.LEAST_ROUNDS),
        (1.5, 0.0, harness.LEAST_LONG_ROUNDS),
        (0.01, 1e9, harness.MOST_ROUNDS),
        (0.01, 0.195, 20),
    ],
)
def test_rounds_fit_the_budget(seconds: float, budget: float, rounds: int) -> None:
    clock = FakeClock()
    call = clock.takes("a", lambda i: seconds)
    blocks = {"a": Block(lambda calls: HostTimer(clock)(call, 1), seconds)}
    assert interleave(blocks, budget, clock=clock)["a"].rounds == rounds


def test_ours_takes_part_in_every_round_and_a_fast_probe_slows_nobody() -> None:
    blocks = {
        "ours": Block(lambda calls: 1.0, 1.0),
        "peer": Block(lambda calls: 0.01, 0.01),
        "probe": Block(lambda calls: 1e-6, 1e-6, probe=True),
    }
    timings = interleave(blocks, 0.0, always="ours", clock=lambda: 0.0)
    assert {t.rounds for t in timings.values()} == {harness.LEAST_LONG_ROUNDS}


def test_one_slow_round_makes_no_slow_variant() -> None:
    clock = FakeClock()
    even = clock.takes("a", lambda i: 0.01)
    once = clock.takes("b", lambda i: 9.0 if i == 0 else 0.02)
    timer = HostTimer(clock)
    blocks = {
        "a": Block(lambda calls: timer(even, 1), 0.01),
        "b": Block(lambda calls: timer(once, 1), 9.0),
    }
    timings = interleave(blocks, 0.0, clock=clock)
    assert timings["b"].rounds == harness.LEAST_ROUNDS
    assert timings["b"].median == pytest.approx(0.02)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists(),
    reason="tells the growth of a process on Linux with glibc",
)
def test_peak_memory() -> None:
    """Of torch's allocator, of any other, and of what a library keeps for each thread."""
    size, kept = 2**22, threading.local()
    chain = lambda: torch.ones(size).add(1).mul(2)  # two of the three are there at a time
    numpy = lambda: np.ones(size // 2).sum()

    def keeping() -> None:
        if not hasattr(kept, "block"):
            kept.block = np.ones(size // 2)

    calls = {chain: 8 * size, numpy: 4 * size, keeping: 4 * size, lambda: None: 0}
    for call, want in calls.items():
        call()  # what else the process frees meanwhile, and pages counted late, come to less
        assert memory.peak_bytes(call, CPU) == pytest.approx(want, rel=0.02, abs=2**20)
    assert memory._allocated(numpy) == memory._allocated(keeping) == 0


def test_limit_is_the_slower_of_product_and_pass() -> None:
    times = {"copy": 4.0, "read": 3.0, "mm": 5.0, "tiles": 2.0}

    def limit(*names: str) -> tuple[float, str]:
        found = limits.limit({name: Timing.of([times[name]], 1) for name in names})
        return found.seconds, found.by

    assert limit("copy", "read") == (3.0, "read")
    assert limit("copy", "read", "mm") == (5.0, "mm")
    assert limit("copy", "read", "mm", "tiles") == (3.0, "read")


@pytest.mark.skipif(not _ops.EXTENSION, reason="needs the extension")
def test_the_tile_product_is_scaled_to_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuromod_ext import _C

    calls = []

    def tile_seconds(*args: Any) -> float:
        calls.append(args)
        return 0.25

    monkeypatch.setattr(_C, "tile_seconds", tile_seconds, raising=False)
    work = limits.Work(2 * math.prod(limits.TILE) * 12, 1000, (8, 8, 8))
    found = limits.probes(work, torch.bfloat16, CPU, HostTimer())
    assert found["tiles"].run() == pytest.approx(12 * 0.25)
    assert calls[0] == ("bfloat16", *limits.TILE, limits.TILE_REPEATS)
    with harness.threads(2):
        found = limits.probes(work, torch.bfloat16, CPU, HostTimer())
    assert found["tiles"].run() == pytest.approx(12 * 0.25 / 2)
