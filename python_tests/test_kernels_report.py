"""``make kernels``: what ptxas says becomes a table, and a spill a failure."""

from pathlib import Path

import pytest

from benchmarks import kernels

SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8neuromod1fIfLi4EEEvPT_b' for 'sm_90a'
ptxas info    : Function properties for _ZN8neuromod1fIfLi4EEEvPT_b
    16 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compiling entry function '_ZN8neuromod12_GLOBAL__N_11gIdEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN8neuromod12_GLOBAL__N_11gIdEEvv
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 80 registers, used 0 barriers, 384 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN8neuromod1hEv' for 'sm_100'
ptxas info    : Function properties for _ZN8neuromod1hEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch):
    def set_output(**spills: int) -> None:
        monkeypatch.setattr(kernels, "sources", lambda: [Path("kernels.cu")])
        monkeypatch.setattr(kernels, "resources", lambda nvcc, source: SAID.format(**spills))
        found = {"find_nvcc": lambda: "/cuda/bin/nvcc"}
        monkeypatch.setattr(kernels.runpy, "run_path", lambda path: found)

    return set_output


def test_the_table(compiled, capsys: pytest.CaptureFixture[str]) -> None:
    """Float64 may spill."""
    compiled(stores=0, loads=0)
    assert kernels.main() == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["f<float32,", "4>", "sm_90a", "40", "4096", "16", "0"] in rows
    assert ["g<float64>", "sm_80", "80", "0", "0", "12"] in rows
    assert ["h", "sm_100", "8", "0", "0", "0"] in rows
    assert "3 kernels; 1 spill registers" in shown


@pytest.mark.parametrize("spills", [(4, 0), (0, 4)])
def test_a_spill_fails(spills, compiled, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(stores=spills[0], loads=spills[1])
    assert kernels.main() == 1
    assert capsys.readouterr().err == (
        "neuromod_ext: registers are spilled by f<float32, 4> (sm_90a)\n"
    )


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels.runpy, "run_path", lambda path: {"find_nvcc": lambda: None})
    assert kernels.main() == 1
    assert capsys.readouterr().err.startswith("neuromod_ext: make kernels needs nvcc, which was")


def test_all_kernels_are_compiled() -> None:
    names = {path.name for path in kernels.sources()}
    assert {"manifold_linear.cu", "interpolate_weights.cu", "manifold_step.cu"} <= names
    assert "emulator_test.cu" not in names
