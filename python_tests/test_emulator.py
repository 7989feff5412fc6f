"""The emulator that runs CUDA kernels on the CPU, and the kernels in another order of threads."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bounds import check
from conftest import EMULATED
from op_entries import OPS
from sampling import LAYOUTS, Draw

PROGRAM = Path(__file__).resolve().parents[1] / "build" / "emulator_test"


def test_the_emulators_own_checks_pass() -> None:
    assert PROGRAM.exists(), "build/emulator_test is missing: run `make`"
    result = subprocess.run([PROGRAM], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "0 failed"


@pytest.fixture
def reversed_lanes() -> Iterator[None]:
    torch.ops.load_library(str(EMULATED))
    reverse = ctypes.CDLL(str(EMULATED)).neuromod_emulator_reverse_lanes
    reverse(True)
    yield
    reverse(False)


@pytest.mark.parametrize("name", list(OPS))
def test_kernels_do_not_depend_on_the_order_of_threads(name: str, reversed_lanes: None) -> None:
    """Where a barrier is missing, one of the two orders reads what is not there yet."""
    op, function = OPS[name], getattr(torch.ops.neuromod_emulated, name).default
    for i in range(20):
        draw = Draw(f"reversed/{name}/{i}", op.dtypes[i % len(op.dtypes)], layouts=LAYOUTS)
        slow = name.startswith(("manifold_linear", "manifold_conv"))
        large = i < 2 and not slow
        call = op.large(draw) if large else op.draw(draw, 20_000)
        want = op.expected(call)
        for got, expected in zip(op.run(function, call), want, strict=True):
            check(got, expected, draw)
