"""``make kernels``: what ptxas says becomes a table, and a spill a failure."""

import json
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
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.1'\n")
    nvcc.chmod(0o755)

    def set_output(**spills: int) -> None:
        monkeypatch.setattr(kernels, "sources", lambda: [Path("kernels.cu")])
        monkeypatch.setattr(kernels, "resources", lambda nvcc, source: SAID.format(**spills))
        found = {"find_nvcc": lambda: str(nvcc)}
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
    record = json.loads((kernels.RESULTS / "kernels.json").read_text())
    assert record["compiler"] == "nvcc 13.0"
    assert [row["kernel"] for row in record["kernels"]] == ["f<float32, 4>", "g<float64>", "h"]
    assert "| kernels.cu | `h` | 8 | 0 | 0 | 0 |" in (kernels.RESULTS / "kernels.md").read_text()


def test_names_leave_parameters_out() -> None:
    f = "void neuromod::(anonymous namespace)::f<float>(neuromod::Pass<float>)"
    assert kernels.shorten(f) == "f<float32>"


def test_what_differs_between_architectures_is_shown_for_each() -> None:
    one = kernels.Usage("a.cu", "f", "80", 40, 16, 0, 0)
    text = kernels.markdown([one, kernels.replace(one, arch="90a", registers=42)], "nvcc 1")
    assert "| a.cu | `f` | 40 / 42 | 16 | 0 | 0 |" in text


def test_no_main_kernel_of_the_committed_report_spills() -> None:
    record = json.loads((kernels.ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    found = [kernels.Usage(**row) for row in record["kernels"]]
    assert {usage.arch for usage in found} == set(kernels.ARCHITECTURES)
    assert {"manifold_linear_fold.cu", "manifold_step.cu"} <= {usage.source for usage in found}
    assert not [usage for usage in found if usage.fails]
    report = (kernels.ROOT / "benchmarks" / "results" / "kernels.md").read_text()
    assert report == kernels.markdown(found, record["compiler"])


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
