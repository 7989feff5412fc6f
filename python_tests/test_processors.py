"""Ways of lesser processors: other row operations, other tile products, than this one's best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neuromod_ext.functional as MF
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


FIRST = """
import sys, torch
with torch.backends.mkldnn.flags(enabled=sys.argv[1] == "on"):
    import neuromod_ext
    x, P = torch.ones(2, 2).bfloat16(), torch.ones(1, 2, 2).bfloat16()
    neuromod_ext.functional.manifold_linear(x, P, torch.ones(2, 1))
print(*neuromod_ext._C.cpu_features())
"""


def test_what_is_switched_off_at_first_is_found_all_the_same() -> None:
    on, off = (
        subprocess.run([sys.executable, "-c", FIRST, state], capture_output=True, text=True)
        for state in ("on", "off")
    )
    assert on.returncode == off.returncode == 0, off.stderr
    assert on.stdout == off.stdout


@pytest.mark.parametrize("B, K, O, I", [(47, 4, 32, 68), (43, 4, 60, 46), (66, 4, 67, 56)])
def test_products_of_ours_do_not_depend_on_threads(B: int, K: int, O: int, I: int) -> None:
    """Where oneDNN is switched off, torch's product would take threads as it likes."""
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, P, c = (torch.randn(*n, generator=generator) for n in ((B, I), (K, O, I), (B, 2)))
    index = torch.randint(K, (B,), generator=generator)
    found = []
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            for number in (1, 2):
                torch.set_num_threads(number)
                found.append(MF.manifold_linear_local(x, P, index, c))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
