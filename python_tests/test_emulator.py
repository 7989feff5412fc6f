"""The emulator that runs CUDA kernels on the CPU: its own checks, written in C++."""

import subprocess
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "build" / "emulator_test"


def test_the_emulators_own_checks_pass():
    assert PROGRAM.exists(), "build/emulator_test is missing: run `make`"
    result = subprocess.run([PROGRAM], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "0 failed"
