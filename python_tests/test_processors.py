"""Ways of lesser processors: other row operations, other tile products, than this one's best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuromod_ext import _C, _ops

pytestmark = pytest.mark.skipif(not _ops.EXTENSION, reason="no kernels are built")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )


def verify(dtypes: str, share: str, **environment: str) -> None:
    oracle = ("python_tests/test_oracle.py", "-m", "not full", "-k", f"cpu{dtypes}")
    done = run("pytest", *oracle, "--share", share, **environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("isa", "share"),
    [
        ("baseline", "0.1"),
        pytest.param("baseline", "1", marks=pytest.mark.full),
        pytest.param("avx2", "1", marks=pytest.mark.full),
    ],
)
def test_row_operations(isa: str, share: str) -> None:
    asked = run("neuromod_ext", "info", NEUROMOD_ISA=isa)
    if "expected NEUROMOD_ISA" in asked.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert f"{isa} row operations" in asked.stdout
    verify("", share, NEUROMOD_ISA=isa)


def test_unknown_row_operations_are_refused() -> None:
    asked = run("neuromod_ext", "info", NEUROMOD_ISA="mmx")
    assert asked.returncode != 0
    assert "expected NEUROMOD_ISA to be one that this processor has" in asked.stderr
    assert "got mmx; unset it" in asked.stderr


@pytest.mark.parametrize(
    ("isa", "pairs"), [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True)]
)
def test_tile_products_of_half_types(isa: str, pairs: bool) -> None:
    """oneDNN is kept from a part of the processor: bfloat16 goes as pairs, or widened."""
    if pairs and "avx512bf16" not in _C.cpu_features():
        pytest.skip("this processor multiplies no pairs")
    asked = run("neuromod_ext", "info", ONEDNN_MAX_CPU_ISA=isa)
    assert ("bfloat16 pairs" in asked.stdout) == pairs
    assert "16 tiles" not in asked.stdout
    verify(" and float16", "0.2", ONEDNN_MAX_CPU_ISA=isa)  # and so bfloat16
