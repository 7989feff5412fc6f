"""The experiment on random weights: a tiny run from end to end, an interruption, and its parts."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal
from torch.nn import functional as F

from benchmarks.papers import contexts, learners, random_weights, resume
from benchmarks.papers.__main__ import main
from benchmarks.papers.data import load
from neuromod_ext import continual

ROOT = Path(__file__).parents[1]
TINY = [
    *("random-weights", "--train-images", "96", "--test-images", "60", "--units", "80"),
    *("--tasks", "4", "--epochs", "1", "--pairs", "3", "--dense-steps", "2"),
]
ROTATION = [*TINY, "--streams", "rotation"]
FIGURES = ("learning", "similarity", "histograms", "reconstructions")


def results(folder: Path, name: str = "rotation") -> bytes:
    """The JSON of a stream, byte for byte, without times, date and machine."""
    record = read(folder, name)
    return json.dumps({k: v for k, v in record.items() if k not in TIMED}).encode()


TIMED = ("timing", "environment")


def read(folder: Path, name: str = "rotation") -> dict[str, Any]:
    return json.loads((folder / f"random-weights-{name}-digits.json").read_text())


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    streams = ["rotation", "shift-1px", "shift-2px"]
    assert main([*TINY, "--seeds", "2", "--streams", *streams, "--out", str(out)]) == 0
    return out


def test_json_has_every_number(tiny_run: Path) -> None:
    record = read(tiny_run)
    assert record["stream"]["tasks"] == ["0°", "10°", "20°", "30°"]
    assert [(r["model"], r["seed"]) for r in record["runs"]] == [
        (model, seed) for seed in (0, 1) for model in learners.MODELS
    ]
    for run in record["runs"]:
        matrix = np.full((4, 4), np.nan)
        for i, row in enumerate(run["matrix"]):
            assert len(row) == i + 1
            matrix[i, : i + 1] = row
        assert run["average_accuracy"] == continual.average_accuracy(matrix)
        assert run["forgetting"] == continual.forgetting(matrix)
        if run["model"] == "sequential":
            assert run["tasks_changed_later"] == [0, 1, 2, 3]
        else:
            assert run["tasks_changed_later"] == [0, 0, 0, 0]
            assert run["forgetting"] == 0
    for found in record["contexts"]:
        for when in ("before", "after"):
            assert np.array(found["similarity"][when]).shape == (4, 4)
            assert -1 <= found["t_gsh"][when]["score"] <= 2
    shown = load("digits").split(0)[1].take(slice(60)).y.bincount(minlength=10).clamp(max=3)
    of_all, of_one = int(shown.sum()), int(shown.square().sum())
    for when in ("before", "after"):
        counts = record["contexts"][0]["histograms"][when]
        assert sum(counts["intra"]) == 4 * (of_all**2 - of_one) / 2
        assert sum(counts["inter"]) == 4 * 3 / 2 * of_one
    assert "histograms" not in record["contexts"][1]
    assert np.array(record["contexts"][0]["reconstructions"]["images"]).shape == (2, 4, 12, 12)
    assert record["timing"]["step"]["dense_over_library"] > 0
    assert len(record["timing"]["runs"]) == 2 * len(learners.MODELS)
    assert not list(tiny_run.glob("*.unfinished"))


def test_figures_show_something(tiny_run: Path) -> None:
    from matplotlib.image import imread

    for stream in ("rotation", "shift-1px", "shift-2px"):
        for name in FIGURES:
            pixels = imread(tiny_run / f"random-weights-{stream}-digits-{name}.png")
            assert min(pixels.shape[:2]) > 250
            assert 0.02 < (pixels[..., :3].min(2) < 0.9).mean() < 0.98


def test_report_says_what_the_json_does(tiny_run: Path) -> None:
    text = (tiny_run / "random-weights-digits.md").read_text()
    record = read(tiny_run)
    for model in learners.MODELS:
        ends = [run["average_accuracy"] for run in record["runs"] if run["model"] == model]
        assert f"| {np.mean(ends):.1f} ± " in text
    for name in ("rotation", "shift-1px", "shift-2px"):
        assert text.count(f"(random-weights-{name}-digits-learning.png)") == 1
    assert "Mantel" in text


def test_draw_needs_the_json_alone(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in tiny_run.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(random_weights, "learn", None)
    monkeypatch.setattr(random_weights, "load", None)
    assert main(["random-weights", "--draw", "--out", str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in tiny_run.iterdir()}
    report = "random-weights-digits.md"
    assert (tmp_path / report).read_text() == (tiny_run / report).read_text()


def test_augmentations_run(tmp_path: Path) -> None:
    pytest.importorskip("kornia")
    options = [*TINY, "--tasks", "8", "--models", "fly", "--streams", "augment"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "random-weights-augment-digits-tree.png").exists()
    text = (tmp_path / "random-weights-digits.md").read_text()
    assert "the finest groups with original, blur, perspective, erasing in one: " in text
    assert "next to the inverted images: " in text


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole")
    assert main([*ROTATION, "--out", str(out)]) == 0
    return results(out)


@pytest.mark.parametrize(
    "saves", [4, *(pytest.param(saves, marks=pytest.mark.full) for saves in (1, 6, 15))]
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    saves: int,
    uninterrupted: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save, left = resume.Kept.save, [saves]

    def interrupted(*args: Any) -> None:
        save(*args)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(resume.Kept, "save", interrupted)
        assert main([*ROTATION, "--out", str(tmp_path)]) == 130
    shown = capsys.readouterr().err
    assert shown == "interrupted: finished tasks are kept, the same command goes on\n"
    learned = []
    fit = continual.fit
    monkeypatch.setattr(continual, "fit", lambda *a, **o: learned.append(1) or fit(*a, **o))
    assert main([*ROTATION, "--out", str(tmp_path)]) == 0
    assert len(learned) == 4 * len(learners.MODELS) - saves  # nothing is learned twice
    assert results(tmp_path) == uninterrupted


def test_a_killed_run_goes_on_to_the_same_bits(uninterrupted: bytes, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.papers", *ROTATION, "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    unfinished = tmp_path / "random-weights-digits.unfinished"
    end = time.monotonic() + 120
    while not list(unfinished.glob("*.pt")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(unfinished.glob("*.pt")), "it was over before it could be killed"
    assert main([*ROTATION, "--out", str(tmp_path)]) == 0
    assert results(tmp_path) == uninterrupted
    assert not unfinished.exists()


def test_a_file_is_kept_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = resume.Kept(tmp_path / "kept", {})
    kept.save("part", {"rows": [1.0]})

    def breaks(state: Any, path: Path) -> None:
        path.write_bytes(b"half of i")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", breaks)
        with pytest.raises(KeyboardInterrupt):
            kept.save("part", {"rows": [1.0, 2.0]})
    assert resume.Kept(tmp_path / "kept", {}).load("part") == {"rows": [1.0]}
    assert kept.load("other") is None


def test_an_unfinished_run_has_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_weights, "learn", interrupted)
    options = [*ROTATION, "--out", str(tmp_path)]
    assert main(options) == 130
    capsys.readouterr()
    assert main([*options, "--epochs", "7"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: --epochs: expected 1, with which an unfinished run has begun")
    assert message.endswith(", got 7; finish that, or pass --fresh to forget it\n")
    assert main([*options, "--epochs", "7", "--fresh"]) == 130
    assert main([*options, "--epochs", "7"]) == 130


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--tasks", "2"], "--tasks: expected at least 3, got 2"),
        (["--test-images", "49"], "--test-images: expected at least 50, got 49"),
        (["--dense-steps", "-1"], "--dense-steps: expected at least 0, got -1"),
        (["--units", "0"], "--units: expected at least 1, got 0"),
        (["--data-dir", "."], "--data-dir: expected none with --data digits"),
        (["--data", "mnist", "--data-dir", "nowhere"], "got no such folder"),
        (["--out", __file__], "--out: expected a folder to write to"),
        (["--draw"], "--draw: expected random-weights-…-digits.json in "),
    ],
)
def test_bad_options_fail_before_training(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random_weights, "learn", None)
    assert message in refusal(["random-weights", "--out", str(tmp_path), *options], capsys)


def test_broken_json_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "random-weights-rotation-digits.json").write_text("{")
    said = refusal(["random-weights", "--draw", "--out", str(tmp_path)], capsys)
    assert "expected JSON in" in said


def test_without_kornia_there_are_still_the_other_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    said = refusal([*TINY, "--out", str(tmp_path)], capsys)
    assert "pip install neuromod_ext[augment], or leave augment out" in said
    options = ["--streams", "shift-2px", "--models", "linear"]
    assert main([*TINY, *options, "--out", str(tmp_path)]) == 0


def repetition(tasks: int = 3, **options: Any) -> learners.Repetition:
    given = {"train_images": 300, "test_images": 80, "units": 200, "tasks": tasks, **options}
    config = random_weights.RandomWeights(**given)
    return config._repetition("rotation", load("digits"), 0)


def test_models_are_of_the_sizes_they_should_be() -> None:
    for sizes in (learners.Sizes(784, 7840, 36), learners.Sizes(144, 1440, 12)):
        contexts = sizes.tasks * (sizes.hidden + 1)
        mlp = sum(p.numel() for p in learners.mlp(sizes).parameters())
        assert mlp == pytest.approx(contexts, rel=0.01)
        linear = sum(p.numel() for p in learners.linear(sizes).parameters())
        assert linear == pytest.approx(sizes.hidden + 1, rel=0.01)


def test_dense_code_is_the_same_network() -> None:
    part = repetition()
    fly = part.untrained()
    inputs = part.test[0].inputs
    dense = contexts.Dense(fly, 144)
    torch.testing.assert_close(dense(inputs), fly.logits(0, inputs), rtol=1e-4, atol=1e-4)


def test_the_flys_parts_make_its_logits() -> None:
    part = repetition()
    fly, inputs = part.untrained(), part.test[0].inputs
    gains = fly.gains()
    assert gains.shape == (3, 200)
    for t in range(3):
        expected = F.linear(fly.hidden(inputs) * gains[t], fly.readout)
        torch.testing.assert_close(fly.logits(t, inputs), expected, rtol=1e-4, atol=1e-4)
    hidden = inputs.flatten(1)[:, fly.index].sum(2)
    expected = F.relu(hidden - hidden.mean(1, keepdim=True))
    torch.testing.assert_close(fly.hidden(inputs), expected, rtol=1e-4, atol=1e-4)
    assert fly.index.shape == (200, 7)


def test_best_match_share_is_the_share_of_the_best_matches() -> None:
    means = torch.randn(3, 5, 40)
    assert contexts.best_match_share(means + 0.1 * torch.randn(3, 5, 40), means) == 1
    assert contexts.best_match_share(means[:, [1, 0, 2, 3, 4]], means) == pytest.approx(3 / 5)
    assert contexts.best_match_share(-means, means) == 0
    chance = [contexts.best_match_share(torch.randn(3, 5, 40), means) for _ in range(100)]
    assert np.mean(chance) == pytest.approx(1 / 5, abs=0.05)
    means[:, 4] = torch.nan
    assert contexts.best_match_share(means.nan_to_num(0), means) == pytest.approx(4 / 5)


def test_untrained_contexts_are_those_that_training_begins_with(tmp_path: Path) -> None:
    part = repetition()
    learner = part.learner("fly")
    part.begin(learner, 0)
    torch.testing.assert_close(learner.gains()[0], part.untrained().gains()[0], rtol=0, atol=0)


def test_what_forgets_and_what_does_not(tmp_path: Path) -> None:
    part = repetition(tasks=9, train_images=500, units=600)
    ends = {}
    for name in learners.MODELS:
        kept = resume.Kept(tmp_path / name, {})
        options = {"epochs": 5, "batch_size": 16}
        _, state = learners.learn(name, part, options, kept, lambda epochs: None)
        ends[name] = np.mean(state["rows"][-1])
    assert all(ends[name] > ends["sequential"] + 0.1 for name in ("fly", "separate", "linear")), (
        ends
    )
