"""The row operations of every instruction set that this processor has, not only of its best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuromod_ext import _ops

pytestmark = pytest.mark.skipif(not _ops.EXTENSION, reason="no kernels are built")


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"NEUROMOD_ISA": isa},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("isa", "share"),
    [
        ("baseline", "0.1"),
        pytest.param("baseline", "1", marks=pytest.mark.full),
        pytest.param("avx2", "1", marks=pytest.mark.full),
    ],
)
def test_ops_against_the_oracle(isa: str, share: str) -> None:
    asked = run(isa, "neuromod_ext", "info")
    if "expected NEUROMOD_ISA" in asked.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert f"{isa} row operations" in asked.stdout
    oracle = ("python_tests/test_oracle.py", "-m", "not full", "-k", "cpu", "--share", share)
    done = run(isa, "pytest", *oracle)
    assert done.returncode == 0, done.stdout


def test_an_unknown_one_is_refused() -> None:
    asked = run("mmx", "neuromod_ext", "info")
    assert asked.returncode != 0
    assert "expected NEUROMOD_ISA to be one that this processor has" in asked.stderr
    assert "got mmx; unset it" in asked.stderr
