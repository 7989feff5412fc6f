"""What ``make gpu`` does after a kernel that fails, which takes the GPU from its process."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks.gpu import bench
from benchmarks.speed import harness, measure, results
from benchmarks.speed.runner import BENCHES

ROOT = Path(__file__).parents[1]


def test_a_gpu_is_lost_when_a_kernel_has_failed(monkeypatch) -> None:
    gpu, failed = torch.device("cuda"), Mock(side_effect=RuntimeError("an illegal access"))
    for outcome, lost in ((Mock(), False), (failed, True)):
        monkeypatch.setattr(torch.cuda, "synchronize", outcome)
        assert harness.is_lost(gpu) is lost
    assert not harness.is_lost(torch.device("cpu"))


def test_after_a_kernel_that_failed_a_fresh_process_goes_on(tmp_path: Path, monkeypatch) -> None:
    quick = list(BENCHES["manifold_metric"](torch.float32, True))
    monkeypatch.setattr(bench, "groups", lambda dtype: quick if dtype == torch.float32 else [])
    monkeypatch.setattr(bench, "card", lambda: "none")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    for module in (bench, measure):
        monkeypatch.setattr(module, "is_lost", lambda device: True)

    def fresh(program: str, words: list[str]) -> None:
        assert words == [program, "-m", "benchmarks.gpu.bench"]
        raise SystemExit

    monkeypatch.setattr(os, "execv", fresh)
    for measured in (1, 2):
        with pytest.raises(SystemExit):
            bench.main(torch.device("cpu"))
        cases = results.read(tmp_path / "speed-cuda-none.json")["cases"]
        assert len(cases) == measured
        assert cases[-1]["summary"]["ratio"] is None
        assert not cases[-1]["limits"]
    bench.main(torch.device("cpu"))
    assert (tmp_path / "speed-cuda-none.png").exists()


LOSES = """
import importlib.util, torch
from benchmarks.speed import harness

spec = importlib.util.spec_from_file_location("shared", {conftest!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
pytest_runtest_makereport = shared.pytest_runtest_makereport
lost = []
torch.cuda.is_initialized = lambda: True
harness.is_lost = lambda device: bool(lost)
"""
TESTS = """
def test_loses():
    from conftest import lost
    lost.append(True)
    raise RuntimeError("an illegal access")

def test_goes_on():
    from conftest import lost
    assert not lost
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_test_that_loses_the_gpu_fails_alone(workers: int, tmp_path: Path) -> None:
    if workers:
        pytest.importorskip("xdist")
    conftest = str(ROOT / "python_tests" / "conftest.py")
    (tmp_path / "conftest.py").write_text(LOSES.format(conftest=conftest))
    (tmp_path / "test_two.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "."]
    command += ["-n", "1"] if workers else []
    environment = {name: v for name, v in os.environ.items() if "PYTEST" not in name}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "test_two.py::test_loses lost the GPU: RuntimeError: an illegal access" in said
    assert ("1 failed, 1 passed" in said) == bool(workers), said
    assert "goes_on FAILED" not in said
