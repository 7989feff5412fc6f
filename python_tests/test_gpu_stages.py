"""``make gpu``: its stages, with commands that need no GPU."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sanitizer_cases
import test_gpu
import torch
from conftest import EMULATED

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import bench
from benchmarks.speed import cuda_plan_costs as plans
from benchmarks.speed import harness, results
from benchmarks.speed.runner import BENCHES
from neuromod_ext import _ops

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


def test_each_stage_leaves_its_outcome(run, capsys) -> None:
    status, found = run(
        {
            "hangs": stage("import time; print('begun', flush=True); time.sleep(60)", limit=2),
            "greets": stage(GREETS),
            "fails": stage("raise SystemExit('no')", GREETS),
        },
        seconds=122,
    )
    assert status == 1
    assert [found[name]["status"] for name in found] == ["timed out", "passed", "failed"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fails", "failed", "1", "2"] in [[r[0], r[1], *r[-2:]] for r in rows if len(r) == 5]
    (hung,), (greeted,) = found["hangs"]["commands"], found["greets"]["commands"]
    assert hung["said"] == ["begun"]
    assert found["hangs"]["seconds"] < 20
    command = f"python -c {GREETS}"  # no path of this machine
    assert greeted == {"command": command, "status": "passed", "said": ["hello"]}
    assert [(each["status"], each["said"]) for each in found["fails"]["commands"]] == [
        *(("failed", ["no"]), ("passed", ["hello"])),
    ]


def test_what_a_stage_measured_is_in_the_one_json(run, tmp_path: Path) -> None:
    """Also of a stage that was cut off."""
    path = tmp_path / "speed.json"
    measures = f"open({str(path)!r}, 'w').write('[1]'); import time; time.sleep(60)"
    _, found = run({"bench": replace(stage(measures, limit=2), results=path)}, seconds=3)
    assert found["bench"]["status"] == "timed out"
    assert found["bench"]["results"] == [1]


def test_time_that_is_left_goes_to_the_next(run, monkeypatch) -> None:
    limits = []
    monkeypatch.setattr(driver, "run_stage", lambda _, limit, log: limits.append(limit) or [])
    every = {"one": stage("", limit=20), "two": stage("", limit=30), "three": stage("", limit=40)}
    run(every, seconds=100)
    assert limits == pytest.approx([30, 60, 100], abs=5)  # nothing ran, so nothing was spent
    limits.clear()
    run(every, seconds=45)
    assert limits == pytest.approx([20, 30, 45], abs=5)


def test_what_cannot_run_here_is_skipped(run, capsys) -> None:
    refuses = "print('Device not supported', flush=True); raise SystemExit(1)"
    some = stage(refuses, "raise SystemExit('no')", "print('Device not supported')")
    status, found = run(
        {
            "none": replace(stage(GREETS, GREETS), lacking="no such tool"),
            "some": replace(some, unsupported="device not supported"),
        }
    )
    assert status == 1
    assert [found[name]["status"] for name in found] == ["skipped", "failed"]
    assert [each["said"] for each in found["none"]["commands"]] == 2 * [["no such tool"]]
    assert [(each["status"], each["said"][0]) for each in found["some"]["commands"]] == [
        ("skipped", "Device not supported"),
        ("failed", "no"),
        ("skipped", "Device not supported"),
    ]
    assert "no such tool" in capsys.readouterr().out
    assert run({"none": replace(stage(GREETS), lacking="no such tool")})[0] == 0


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


def test_of_a_stage_only_what_has_not_passed_is_run_again(run, tmp_path: Path) -> None:
    mark, gate = tmp_path / "mark", tmp_path / "gate"
    counts = f"open({str(mark)!r}, 'a').write('x')"
    waits = f"import os; raise SystemExit(not os.path.exists({str(gate)!r}))"
    assert run({"two": stage(counts, waits)})[0] == 1
    gate.touch()
    status, found = run({"two": stage(counts, waits)})
    assert (status, found["two"]["status"], mark.read_text()) == (0, "passed", "x")
    assert [each["status"] for each in found["two"]["commands"]] == ["passed", "passed"]


def test_without_time_or_a_build_nothing_begins(run, capsys) -> None:
    status, found = run({"build": stage("raise SystemExit(1)"), "two": stage(GREETS)})
    assert status == 1
    assert list(found) == ["build"]
    status, found = run({"two": stage(GREETS)}, seconds=1)
    assert status == 1
    assert "two" not in found
    assert "two: no time left; run it by STAGE=two" in capsys.readouterr().out


def test_the_stages_name_what_there_is(monkeypatch) -> None:
    every = driver.stages("90a")
    assert list(every) == ["build", "tests", "bench", "plans", "stress", "sanitize"]
    assert sum(stage.limit for stage in every.values()) <= 60 * driver.MINUTES < 600
    assert every["build"].environment["NEUROMOD_CUDA_ARCHS"] == "90a"
    tools = [command[command.index("--tool") + 1] for command in every["sanitize"].commands]
    assert tuple(tools) == driver.TOOLS
    for stage in every.values():
        for command in stage.commands:
            for word in command:
                assert not word.endswith(".py") or (ROOT / word).exists()
    monkeypatch.setattr(driver, "find_sanitizer", lambda: None)
    assert "no compute-sanitizer" in driver.stages("90a")["sanitize"].lacking
    monkeypatch.setattr(driver, "find_sanitizer", lambda: "/bin/compute-sanitizer")
    assert not driver.stages("90a")["sanitize"].lacking


def test_a_backend_is_chosen_by_the_parameter_not_by_a_name(tmp_path: Path) -> None:
    """On a machine without tyro, too."""
    (tmp_path / "tyro.py").write_text("raise ImportError('there is no tyro here')")
    paths = ["python_tests", "python_tests/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", *paths, "--collect-only", "--quiet"]
    command += ["--backend", "emulated", "-m", "not full", "--override-ini", "addopts="]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 200
    assert all(re.search(r"[\[-]emulated[\]-]", name) for name in found)
    files = {name.split("::")[0].removeprefix("python_tests/test_") for name in found}
    assert {"oracle.py", "columns.py", "memory.py", "nonfinite.py", "bad_calls.py"} <= files
    assert not [name for name in found if "cuda_plan" in name]  # they need the emulator
    for path in (ROOT / "python_tests").glob("test_*.py"):  # files are found by the annotation
        assert not re.search(r"def test_\w+\([^)]*\bbackend\b(?!:)", path.read_text()), path


def test_stress_runs_every_test_of_its_file_once() -> None:
    huge, slow, rest = (command[-1] for command in driver.stages("90a")["stress"].commands)
    assert rest == f"not ({huge} or {slow})"
    names = [name for name in vars(test_gpu) if name.startswith("test_")]
    chosen = [[n for n in names if word in n] for word in (huge, *slow.split(" or "))]
    assert chosen == [
        ["test_huge", "test_huge_convolution", "test_huge_fly_hash"],
        *(["test_derivatives"], ["test_opcheck"], ["test_compile"]),
    ]
    assert len(names) > len(chosen)


HUGE = {  # in small
    "conv of many samples": (test_gpu.compare_convolution, (5, 3, 4, 12, 13), 3),
    "conv of many pixels": (test_gpu.compare_convolution, (1, 3, 9, 14, 12), 3),
    "conv of many weights": (test_gpu.compare_convolution, (3, 9, 10, 2, 2), 1),
    "fly_hash": (test_gpu.compare_fly_hash, (9, 20, 40)),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_results_are_compared(name: str) -> None:
    """On the emulated kernels; a last element that is wrong is seen."""
    torch.ops.load_library(str(EMULATED))
    emulated = {name: getattr(torch.ops.neuromod_emulated, name).default for name in _ops.NAMES}
    compare, *sizes = HUGE[name]
    compare(*sizes, emulated, "cpu")
    first = name.split()[0].replace("conv", "manifold_conv")
    backward = 4 if "conv" in name else 1  # results
    for op, place in [(first, 0), *((f"{first}_backward", i) for i in range(backward))]:

        def wrong(*args: Any, op: str = op, place: int = place, **options: Any) -> Any:
            out = emulated[op](*args, **options)
            (out if isinstance(out, tuple) else (out,))[place].flatten()[-1] += 100
            return out

        with pytest.raises(AssertionError):
            compare(*sizes, emulated | {op: wrong}, "cpu")


@pytest.mark.parametrize(
    ("needed", "free", "total", "outcome"),
    [
        (30e9, 33e9, 40e9, None),
        (30e9, 10e9, 40e9, pytest.skip.Exception),
        (30e9, 10e9, 85e9, AssertionError),
        (90e9, 80e9, 85e9, pytest.skip.Exception),
    ],
)
def test_a_large_card_skips_nothing_it_has_room_for(
    needed: float, free: float, total: float, outcome: type | None, monkeypatch
) -> None:
    kept = [5e9]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free - sum(kept), total))
    with pytest.raises(outcome) if outcome else nullcontext():
        test_gpu.make_room(needed)
    assert not kept


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
    assert (
        "expected stages among build, tests, bench, plans, stress, sanitize"
        in capsys.readouterr().err
    )
    command = ["make", "--no-print-directory", "gpu", "PATH=/bin:/usr/bin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "neuromod_ext: make gpu needs a CUDA GPU, and nvidia-smi finds none here"
    )


def test_sanitizer_cases_cover_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitizer_cases.main("emulated", 2) == 2 * len(_ops.NAMES)
    shown = capsys.readouterr().out
    assert all(f"{name}: 2 calls" in shown for name in _ops.NAMES)


# The speed stage


def test_cases_are_told_apart() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        found = list(bench.groups(dtype))
        assert len({(g.bench, g.label) for g in found}) == len(found)
        assert {g.dtype for g in found} == {dtype}
        assert {g.bench for g in found} <= set(BENCHES)
    assert {g.bench for g in bench.groups(torch.float32)} == {
        *("manifold_linear", "tokens", "manifold_conv", "manifold_step", "interpolate_weights"),
        *("fly_readout", "manifold_metric"),
    }
    compiled = [g.label for g in bench.groups(torch.bfloat16) if bench.is_compiled(g)]
    assert compiled == [
        *("B1024 I1024 O1024 K3", "B256 I512 O512 K3", "B64 I128 O128 K3"),
        "B64 T256 I1024 O1024 K3",
    ]
    assert not any(bench.is_compiled(g) for g in bench.groups(torch.float32))


def test_the_speed_stage(tmp_path: Path, monkeypatch, capsys) -> None:
    """On the CPU: a case is measured, and the next run goes on from it."""
    quick = list(BENCHES["manifold_metric"](torch.float32, True))
    monkeypatch.setattr(bench, "groups", lambda dtype: quick if dtype == torch.float32 else [])
    monkeypatch.setattr(bench, "card", lambda: "none")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "SECONDS", 0.02)
    for expected in (2, 0):
        assert bench.main(torch.device("cpu")) == 0
        shown = capsys.readouterr().out
        assert shown.count("manifold_metric N16 K3 float32") == expected
    assert len(results.read(tmp_path / "speed-cuda-none.json")["cases"]) == 2
    assert (tmp_path / "speed-cuda-none.png").exists()


def test_the_plans_stage(tmp_path: Path, monkeypatch, capsys) -> None:
    """With the emulated kernels and the host's clock: forced plans, beside their predictions."""
    torch.ops.load_library(str(EMULATED))
    monkeypatch.setattr(plans, "PROBLEMS", [(40, 1, 2, 24, 16), (2, 40, 2, 32, 32)])
    monkeypatch.setattr(plans, "ROUNDS", 1)
    monkeypatch.setenv(plans.FORCED, "simt")
    path = tmp_path / "plans.json"
    assert plans.main(torch.device("cpu"), torch.ops.neuromod_emulated, path, 64) == 0
    assert os.environ[plans.FORCED] == "simt"
    record = json.loads(path.read_text())
    assert {"kMemory", "kL2", "kCall", "kLaunch", "gemm bfloat16"} <= set(record["constants"])
    assert all(value > 0 for value in record["constants"].values())
    rows = record["plans"]
    assert {row["pass"] for row in rows} >= {"forward", "grad_basis + grad_coeff"}
    assert {"small", "fold", "expand_gemm"} <= {plan for row in rows for plan in row["plans"]}
    shown = capsys.readouterr().out
    assert "bfloat16 B40 T1 K2 O24 I16" in shown
    row = {"plans": {"a": {"seconds": 3.0}, "b": {"seconds": 2.0}}}
    assert plans.lost(row) == 1.5


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
