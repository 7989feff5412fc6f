"""``make gpu``: its stages, with commands that need no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizer_cases
import torch

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import bench
from benchmarks.speed import harness, results
from benchmarks.speed.runner import BENCHES

ROOT = Path(__file__).parents[1]


def stage(*codes: str, limit: float = 60) -> driver.Stage:
    return driver.Stage([[sys.executable, "-c", code] for code in codes], limit, {"WORD": "hello"})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "code", lambda: "some code")

    def call(stages: dict[str, driver.Stage], seconds: float = 100, again: bool = False):
        status = driver.run(stages, tmp_path / "gpu.json", seconds, again, {"device": "none"})
        return status, json.loads((tmp_path / "gpu.json").read_text())["stages"]

    return call


GREETS = "import os; print(os.environ['WORD'])"


def test_each_stage_leaves_its_outcome(run) -> None:
    status, found = run(
        {
            "greets": stage(GREETS),
            "fails": stage("raise SystemExit('no')", GREETS),
            "hangs": stage("import time; print('begun', flush=True); time.sleep(60)", limit=2),
        }
    )
    assert status == 1
    assert [found[name]["status"] for name in found] == ["passed", "failed", "timed out"]
    assert found["greets"]["said"] == [["hello"]]
    assert found["greets"]["commands"] == [f"python -c {GREETS}"]  # no path of this machine
    assert found["fails"]["statuses"] == ["failed", "passed"]
    assert found["fails"]["said"] == [["no"], ["hello"]]
    assert found["hangs"]["said"] == [["begun"]]
    assert found["hangs"]["seconds"] < 20


def test_a_run_goes_on_with_what_has_not_passed(run, tmp_path: Path, monkeypatch) -> None:
    mark = tmp_path / "mark"
    counts = f"open({str(mark)!r}, 'a').write('x')"
    first = {"one": stage(counts), "two": stage(counts + "; raise SystemExit(1)")}
    assert run(first)[0] == 1
    assert run({"one": stage(counts), "two": stage(counts)})[0] == 0
    assert mark.read_text() == "xxx"  # the first was not run again
    assert run({"one": stage(counts)}, again=True)[0] == 0
    assert mark.read_text() == "xxxx"
    monkeypatch.setattr(driver, "code", lambda: "changed code")
    assert run({"one": stage(counts)})[0] == 0
    assert mark.read_text() == "xxxxx"


def test_without_time_or_a_build_nothing_begins(run, capsys) -> None:
    status, found = run({"build": stage("raise SystemExit(1)"), "two": stage(GREETS)})
    assert status == 1
    assert list(found) == ["build"]
    status, found = run({"two": stage(GREETS)}, seconds=1)
    assert status == 1
    assert "two" not in found
    assert "two: no time left; run it by STAGE=two" in capsys.readouterr().out


def test_the_stages_name_what_there_is() -> None:
    every = driver.stages("90a")
    assert list(every) == ["build", "tests", "stress", "sanitize", "bench"]
    assert every["build"].environment["NEUROMOD_CUDA_ARCHS"] == "90a"
    tools = [command[command.index("--tool") + 1] for command in every["sanitize"].commands]
    assert tuple(tools) == driver.TOOLS
    for stage in every.values():
        for command in stage.commands:
            for word in command:
                assert not word.endswith(".py") or (ROOT / word).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        driver.main(["bench"])
    assert ended.value.code == (
        "neuromod_ext: make gpu needs a CUDA GPU, and torch finds none here"
    )
    with pytest.raises(SystemExit) as ended:
        driver.main(["benches"])
    assert ended.value.code == 2
    assert "expected stages among build, tests, stress, sanitize, bench" in capsys.readouterr().err
    command = ["make", "--no-print-directory", "gpu", "PATH=/bin:/usr/bin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "neuromod_ext: make gpu needs a CUDA GPU, and nvidia-smi finds none here"
    )


def test_sanitizer_cases_cover_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitizer_cases.main("emulated", 2) == 2 * len(sanitizer_cases.NAMES)
    shown = capsys.readouterr().out
    assert all(f"{name}: 2 calls" in shown for name in sanitizer_cases.NAMES)


# The speed stage


def test_cases_are_told_apart() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        found = list(bench.groups(dtype))
        assert len({(g.bench, g.label) for g in found}) == len(found)
        assert {g.dtype for g in found} == {dtype}
        assert {g.bench for g in found} <= set(BENCHES)
    assert {"manifold_linear", "tokens", "manifold_conv", "manifold_metric"} <= {
        g.bench for g in bench.groups(torch.float32)
    }


def test_the_speed_stage(tmp_path: Path, monkeypatch, capsys) -> None:
    """On the CPU: a case is measured, and the next run goes on from it."""
    quick = list(BENCHES["manifold_metric"](torch.float32, True))
    monkeypatch.setattr(bench, "groups", lambda dtype: quick if dtype == torch.float32 else [])
    monkeypatch.setattr(bench, "card", lambda: "none")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "SECONDS", 0.02)
    for expected in (2, 0):
        assert bench.main(torch.device("cpu"), compiled=False) == 0
        shown = capsys.readouterr().out
        assert shown.count("manifold_metric N16 K3 float32") == expected
    assert len(results.read(tmp_path / "speed-cuda-none.json")["cases"]) == 2
    assert (tmp_path / "speed-cuda-none.png").exists()


def test_the_name_of_a_card(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert harness.card() == "h100-80gb-hbm3"


def test_the_cache_is_emptied_before_the_clock_starts(monkeypatch) -> None:
    order = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = "start" if "start" not in order else "end"
            order.append(self.name)

        def record(self) -> None:
            order.append(f"record {self.name}")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 3.0

    class Buffer:
        def zero_(self) -> None:
            order.append("flush")

    properties = type("Properties", (), {"L2_cache_size": 100})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    monkeypatch.setattr(torch, "empty", lambda size, **_: (order.append(size), Buffer())[1])
    timer = harness.CudaTimer()
    assert timer(lambda: order.append("call"), 2) == 0.003
    assert order == [
        *(200, "start", "end", "flush", "synchronize"),
        *("record start", "call", "call", "record end", "wait"),
    ]
