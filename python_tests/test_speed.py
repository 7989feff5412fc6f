"""The speed benchmark's runs: the quick tier from end to end, its JSON, what is drawn from it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import __main__, harness, measure, report, results, runner
from benchmarks.speed.__main__ import main
from benchmarks.speed.problem import BACKWARD, FORWARD, Problem
from neuromod_ext import _ops, functional

ROOT = Path(__file__).parents[1]
METRIC = ["--quick", "--benches", "manifold_metric"]
CASES = 2  # of METRIC


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speed")
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--output", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "profiler" not in done.stderr  # its library's chatter
    assert str(out / "speed-quick-cpu.json") in done.stdout
    assert "× best" in done.stdout
    return out / "speed-quick-cpu.json"


@pytest.fixture
def record(quick: Path) -> dict[str, Any]:
    return json.loads(quick.read_text())


# The quick tier


def test_json_says_where_and_how(record: dict[str, Any]) -> None:
    here = record["environment"]
    assert {"cpu", "cores", "torch", "python", "neuromod_ext", "date", "threads"} <= set(here)
    assert here["device"] == here["cpu"]
    assert here["dirty"] is (here["commit"] or "").endswith("-dirty")
    assert here["kernels"] == ("compiled" if _ops.EXTENSION else "reference")
    assert record["options"] == {"seconds": 0.02, "compile": False, "quick": True}


def test_every_bench_is_measured_or_says_why_not(record: dict[str, Any]) -> None:
    missing = {entry["bench"] for entry in record["skipped"]}
    assert {case["bench"] for case in record["cases"]} | missing == set(runner.BENCHES)
    for entry in record["skipped"]:
        name = re.fullmatch("neuromod_ext.functional has no (.*)", entry["reason"])
        assert name and not hasattr(functional, name[1])
    ways = {(c["dtype"], c["direction"]) for c in record["cases"]}
    assert ways == {(d, w) for d in ("float32", "bfloat16") for w in (FORWARD, BACKWARD)}


def test_json_has_every_number(record: dict[str, Any]) -> None:
    for case in record["cases"]:
        summary = case["summary"]
        ran = {v["name"]: v for v in case["variants"] if "seconds" in v}
        for variant in ran.values():
            seconds = variant["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            least = harness.LEAST_ROUNDS if variant["role"] == "ours" else harness.FEW_ROUNDS
            assert seconds["rounds"] >= least
            assert variant["peak_bytes"] >= 0
            assert (variant["role"] == "plain") == ("error" not in variant)
        (ours,) = (v for v in ran.values() if v["role"] == "ours")
        assert summary["correct"] and ours["error"] <= 1
        right = [v for v in ran.values() if v["role"] == "peer" and v["correct"]]
        fastest = min(right, key=lambda v: v["seconds"]["median"])
        assert summary["best_peer"] == fastest["name"]
        ratio = fastest["seconds"]["median"] / ours["seconds"]["median"]
        assert summary["ratio"] == pytest.approx(ratio, rel=1e-4)
        assert summary["ratio_low"] <= summary["ratio"] <= summary["ratio_high"]
        assert {"copy", "read"} <= set(case["limits"])
        limit = case["limits"][summary["limit"]]["median"]
        assert summary["of_limit"] == pytest.approx(limit / ours["seconds"]["median"], rel=1e-4)
        for variant in case["variants"]:
            assert "seconds" in variant or variant["reason"]


def test_report_is_drawn_from_the_json_alone(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    record["cases"][3]["summary"]["ratio"] = 0.0123
    path, readme = tmp_path / "speed-cpu.json", tmp_path / "README.md"
    results.write(record, path)
    readme.write_text(f"Before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    for _ in range(2):  # the second changes nothing
        assert main(["report", str(path), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert (
            text
            == f"Before\n{report.BEGIN}\n\n{report.markdown([record])}\n\n{report.END}\nafter\n"
        )
    assert "**0.01**" in text and "stale" not in text
    shown = capsys.readouterr().out.splitlines()
    rows = [row for row in shown if re.search(" (f32|bf16) +1 +(forward|fwd)", row)]
    assert " 0.01 " in rows[0]  # the worst case comes first
    assert len(rows) == 2 * len(record["cases"])
    pixels = imread(tmp_path / "speed-cpu.png")
    assert min(pixels.shape[:2]) > 600
    orange = np.abs(pixels[..., :3] - [0xD5 / 255, 0x5E / 255, 0]).max(2) < 0.02
    assert orange.sum() > 100  # a losing case is seen as one


def test_one_table_holds_several_runs(record: dict[str, Any]) -> None:
    other = record | {"environment": record["environment"] | {"device": "another"}}
    other["cases"] = [case for case in record["cases"] if case["dtype"] == "bfloat16"]
    lines = report.markdown([record, other]).splitlines()
    assert [line[:5] for line in lines if line.startswith("- ")] == ["- A: ", "- B: "]
    assert sum("another" in line for line in lines) == 1
    (head,) = (line for line in lines if line.startswith("| op |"))
    assert "| A f32 forward | A f32 fwd+bwd |" in head
    assert head.endswith("| B bf16 forward | B bf16 fwd+bwd |") and "B f32" not in head
    cells = [line.split(" | ") for line in lines[lines.index(head) + 2 :]]
    assert {len(row) for row in cells} == {8}
    assert any(row[-2] == row[-4] != "" for row in cells)


def test_columns_keep_their_order(record: dict[str, Any]) -> None:
    """Whichever dtype was measured first."""

    def head(cases: list[dict[str, Any]]) -> str:
        lines = report.markdown([record | {"cases": cases}]).splitlines()
        return next(line for line in lines if line.startswith("| op |"))

    assert head(record["cases"]) == head(record["cases"][::-1])


def test_readme_holds_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    between = text.partition(report.BEGIN)[2].partition(report.END)[0]
    committed = __main__.committed()
    assert committed and report.END in text
    assert between.strip() == report.markdown([results.read(path) for path in committed])


def test_a_report_of_no_runs_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    assert main(["report"]) == 1
    assert "expected JSON of runs, got no speed-cpu-*.json in " in capsys.readouterr().err


def test_machines_in_file_names() -> None:
    assert harness.in_file_name("Intel(R) Xeon(R) Processor @ 2.1GHz") == (
        "intel-xeon-processor-2-1ghz"
    )


# A run that is cut off, and one that goes on


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions measured."""
    seen = []

    def counting(problem: Problem, direction: str, options: measure.Options) -> dict[str, Any]:
        seen.append(direction)
        return measure.measure(problem, direction, options)

    monkeypatch.setattr(runner, "measure", counting)
    return seen


def test_a_run_goes_on_where_it_was(
    counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "_show", lambda *_: 0)
    path, args = tmp_path / "speed-quick-cpu.json", [*METRIC, "--output", str(tmp_path)]
    assert main(args) == 0
    whole = results.read(path)
    assert len(whole["cases"]) == len(counted) == CASES
    assert main(args) == 0
    assert len(counted) == CASES
    results.write(whole | {"cases": whole["cases"][1:]}, path)
    assert main(args) == 0
    assert counted[CASES:] == [FORWARD]
    assert results.read(path)["cases"][0] == whole["cases"][1]
    assert main([*args, "--fresh"]) == 0
    assert len(counted) == 2 * CASES + 1
    assert main([*args, "--threads", "2"]) == 0  # more cases beside those
    assert len(results.read(path)["cases"]) == 2 * CASES
    monkeypatch.setattr(results, "_digest", lambda: "changed code")
    assert main(args) == 0
    assert len(results.read(path)["cases"]) == CASES
    assert len(counted) == 4 * CASES + 1


def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(problem: Problem, direction: str, options: measure.Options) -> dict[str, Any]:
        if direction == BACKWARD:
            raise KeyboardInterrupt
        return measure.measure(problem, direction, options)

    monkeypatch.setattr(runner, "measure", interrupted)
    assert main([*METRIC, "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("interrupted: ")
    (file,) = tmp_path.iterdir()
    assert [case["direction"] for case in results.read(file)["cases"]] == [FORWARD]


def test_threads_are_set_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counting(problem: Problem, direction: str, options: measure.Options) -> dict[str, Any]:
        seen.append(torch.get_num_threads())
        return measure.measure(problem, direction, options)

    monkeypatch.setattr(runner, "measure", counting)
    assert main([*METRIC, "--threads", "2", "0", "1", "--output", str(tmp_path)]) == 0
    assert seen == [2, 2, 1, 1]  # 0 is 1 here
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benches", "nope"], "--benches: expected some of manifold_linear, tokens, "),
        (["--benches"], "got none"),
        (["--dtypes", "int8"], "--dtypes: expected some of float32, bfloat16, float16, got int8"),
        (["--threads", "-1"], "--threads: expected numbers of at least 0, got -1"),
        (["--seconds", "0"], "--seconds: expected a number above 0, got 0"),
        (["--seconds", "nan"], "--seconds: expected a number above 0, got nan"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got tpu"),
        (["--output", __file__], "--output: expected a folder to write to"),
        (["report", "nowhere.json"], "report: expected the JSON of a run, got nowhere.json: "),
        (["report", __file__], "no JSON"),
        (["report", "benchmarks/results/rotated-digits.json"], "not one of this benchmark"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "measure", None)
    assert main(options) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_readme_without_markers_is_refused(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    assert main(["report", str(quick), "--readme", str(readme)]) == 1
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "no markers"
