"""Peak memory of one call: what it holds beyond its operands."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

Call = Callable[[], Any]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names
LARGEST_KEPT = 2**25  # bytes
SMALLEST_MAPPED = 2**16  # bytes


def settle_allocator() -> None:
    """Put glibc's allocator into the state that a long run brings it to, whatever ran before.

    It keeps freed memory of up to a size that grows to LARGEST_KEPT with what the program frees;
    else a case would be slower at the beginning of a run than at its end.
    """
    _mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
    _mallopt(TRIM_THRESHOLD, 2 * LARGEST_KEPT)


def peak_bytes(call: Call, device: torch.device, once: bool = False) -> int:
    """Bytes that a call holds at its peak, outputs included and operands not.

    On the CPU it is the growth of the process (Linux and glibc; else what torch's allocator gave
    out), on a thread of its own, since libraries keep scratch memory for each thread. What torch
    gave out is the least: the growth is counted in pages, and late. Where the call may be made but
    ``once``, the growth is all.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    resident = _resident(call)
    return resident if once and resident else max(resident, _allocated(call))


def _allocated(call: Call) -> int:
    """The peak by torch's allocator, from the profiler's record of it."""
    with _no_stderr(), profile(profile_memory=True) as record:
        result = call()
    del result
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def _resident(call: Call) -> int:
    """The peak growth of the process; 0 where the system cannot tell."""
    grad, number = torch.is_grad_enabled(), torch.get_num_threads()

    def growth() -> int:
        torch.set_num_threads(number)
        with torch.set_grad_enabled(grad):
            torch.ones(2**16).sum()  # what a thread starts with
            before = _restart_peak()
            result = call()
            peak = _status("VmHWM")
            del result
            return peak - before

    _mallopt(MMAP_THRESHOLD, SMALLEST_MAPPED)  # memory that is freed goes back at once, in whole
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with ThreadPoolExecutor(1) as thread:
            return max(0, thread.submit(growth).result())
    except (AttributeError, OSError):  # no glibc, or no such files
        return 0
    finally:
        settle_allocator()


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)


def _restart_peak() -> int:
    """Set VmHWM, the peak, back to VmRSS, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what the profiler's library writes to stderr at each start and stop."""
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
