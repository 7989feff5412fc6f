"""The papers' experiments: a tiny run from end to end, their data, and what they compare."""

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal
from torch import nn

from benchmarks.papers import data, models, report, rotated
from benchmarks.papers.__main__ import main
from neuromod_ext.nn import ManifoldConv2d, ManifoldLinear

ROOT = Path(__file__).parents[1]
TINY = [
    *("--seeds", "1", "--epochs", "1", "--train-images", "64", "--test-images", "16"),
    *("--angles", "2", "--step", "90"),
]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    command = [sys.executable, "-m", "benchmarks.papers", "rotated", *TINY, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("rotated-digits-accuracy.png", "rotated-digits-ring.png", "rotated-digits.json"):
        assert str(out / name) in done.stdout
    assert len(done.stdout.splitlines()) < 25  # nobody watches: no progress bar
    return out


def test_json_has_every_number(tiny_run: Path) -> None:
    record = json.loads((tiny_run / "rotated-digits.json").read_text())
    assert record["angles"] == [0, 90, 180, 270]
    assert record["seen"] == [0, 180]
    assert record["config"]["epochs"] == 1
    assert {"cpu", "torch", "commit", "threads"} <= set(record["environment"])
    assert [run["model"] for run in record["runs"]] == list(rotated.VARIANTS)
    for run in record["runs"]:
        assert len(run["accuracy"]) == 4
        assert all(0 <= a <= 100 for a in run["accuracy"])
        assert run["train_samples_per_second"] > 0
    assert record["summary"]["ring"]["seen"]["half_width_95"] is None  # one seed has no interval
    assert np.array(record["snapshots"]["1"]).shape == (3, 16, 1, 3, 3)


def test_figures_show_something(tiny_run: Path) -> None:
    from matplotlib.image import imread

    for name in ("accuracy", "ring"):
        pixels = imread(tiny_run / f"rotated-digits-{name}.png")
        assert min(pixels.shape[:2]) > 600
        drawn = pixels[..., :3].min(2) < 0.9
        assert 0.02 < drawn.mean() < 0.5


def test_runs_repeat() -> None:
    config = rotated.Rotated(epochs=1, train_images=64, test_images=32, angles=2, step=90)

    def runs() -> list[list[float]]:
        record = config._record()
        list(rotated.repeat(config, 0, data.load("digits"), record))
        return [run["accuracy"] for run in record["runs"]]

    assert runs() == runs()


def test_unseen_is_all_but_seen() -> None:
    record = rotated.Rotated(angles=7, step=5)._record()
    assert len(record["angles"]) == 72 + 6  # both have 0
    here = [90.0 if angle in record["seen"] else 10.0 for angle in record["angles"]]
    record["runs"] = [{"model": "ring", "accuracy": here}]
    np.testing.assert_allclose(rotated.accuracies(record, "seen")["ring"], [90])
    np.testing.assert_allclose(rotated.accuracies(record, "unseen")["ring"], [10])


def test_the_networks_are_equal() -> None:
    def shapes(model: nn.Module) -> list[tuple[Any, ...]]:
        plain = {ManifoldConv2d: nn.Conv2d, ManifoldLinear: nn.Linear}
        return [
            (
                plain.get(type(layer), type(layer)),
                getattr(layer, "stride", None),
                getattr(layer, "out_channels", getattr(layer, "out_features", None)),
            )
            for layer in model.module
        ]

    ring, plain = models.ring(1, 16), models.Unconditioned(1, 16)
    concatenated, wide = models.Concatenated(1, 16), models.concatenated_wide(1, 16)
    assert shapes(ring) == shapes(plain) == shapes(concatenated)
    assert models.size(ring) == 3 * models.size(plain)
    assert models.size(concatenated) - models.size(plain) == 2 * 16 * 9
    assert models.size(wide) == pytest.approx(models.size(ring), rel=0.03)


def test_ring_and_plain_network_begin_as_the_same() -> None:
    built = []
    for build in (models.ring, models.Unconditioned):
        torch.manual_seed(3)
        built.append(build(1, 16))
    x, turns = torch.randn(8, 1, 12, 12), torch.rand(8)
    torch.testing.assert_close(built[0](x, turns), built[1](x, turns), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [12, 28, 31])
def test_rotate_by_quarter_turns_is_exact(side: int) -> None:
    disc = data.rotate(torch.ones(1, 1, side, side), 0.0)
    x = torch.rand(5, 2, side, side) * disc
    turned = data.rotate(x, torch.tensor([0.0, 90.0, 180.0, 270.0, 360.0]))
    for i in range(5):
        np.testing.assert_allclose(turned[i], np.rot90(x[i], i, axes=(1, 2)), atol=2e-5)


def test_rotate_does_not_tell_the_angle() -> None:
    white = torch.ones(1, 1, 28, 28)
    assert data.rotate(white, 0.0)[0, 0, 0, 0] == 0
    torch.testing.assert_close(data.rotate(white, 45.0), data.rotate(white, 0.0))


def test_digits_are_split_anew_by_each_seed() -> None:
    images = data.load("digits")
    train, test = images.split(0)
    assert (len(train), len(test)) == (1348, 449)
    together = torch.cat((train.x, test.x)).flatten(1)
    original = images.train.x.flatten(1)
    torch.testing.assert_close(together.sum(0), original.sum(0))
    assert not torch.equal(images.split(1)[1].x, test.x)
    assert len(images.split(0, most=10)[0]) == 10


def arrays(name: data.Name) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shape = data.SHAPES[name]
    made = []
    for n in (20, 10):
        made += [rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n, np.uint8)]
    return tuple(made)


def write_npz(folder: Path, name: data.Name) -> None:
    np.savez(folder / f"{name}.npz", **dict(zip(data.NPZ, arrays(name), strict=True)))


def write_idx(folder: Path, packed: bool) -> None:
    for name, array in zip(data.IDX, arrays("mnist"), strict=True):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        content = header + array.tobytes()
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def write_batches(folder: Path) -> None:
    x_train, y_train, x_test, y_test = arrays("cifar10")
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    parts = zip(
        names,
        [*np.split(x_train, 5), x_test],
        [*np.split(y_train, 5), y_test],
        strict=True,
    )
    folder.mkdir()
    for name, x, y in parts:
        planes = x.transpose(0, 3, 1, 2).reshape(len(x), 3072)
        (folder / name).write_bytes(pickle.dumps({b"data": planes, b"labels": y.tolist()}))


@pytest.mark.parametrize("kind", ["npz", "idx", "idx.gz", "cifar npz", "batches", "batches inside"])
def test_formats(kind: str, tmp_path: Path) -> None:
    name: data.Name = "cifar10" if kind.startswith(("cifar", "batches")) else "mnist"
    folder = tmp_path
    if kind.endswith("npz"):
        write_npz(tmp_path, name)
    elif name == "mnist":
        write_idx(tmp_path, packed=kind == "idx.gz")
    else:
        write_batches(tmp_path / data.BATCHES)
        folder = tmp_path / data.BATCHES if kind == "batches inside" else tmp_path
    loaded = data.load(name, folder)
    x_train, y_train, x_test, y_test = arrays(name)
    assert loaded.test is not None
    for images, x, y in ((loaded.train, x_train, y_train), (loaded.test, x_test, y_test)):
        expected = x[:, None] if name == "mnist" else x.transpose(0, 3, 1, 2)
        np.testing.assert_array_equal((images.x * 255).round().numpy().astype(int), expected)
        np.testing.assert_array_equal(images.y, y)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def broken(folder: Path, how: str) -> data.Name:
    """A folder with something wrong in it; the data set it is for."""
    if how == "empty":
        return "mnist"
    if how == "truncated idx":
        write_idx(folder, packed=False)
        file = folder / data.IDX[0]
        file.write_bytes(file.read_bytes()[:-5])
        return "mnist"
    if how == "no idx":
        write_idx(folder, packed=False)
        (folder / data.IDX[0]).write_bytes(b"<html>not found</html>")
        return "mnist"
    if how == "missing labels":
        write_idx(folder, packed=True)
        (folder / f"{data.IDX[1]}.gz").unlink()
        return "mnist"
    if how == "evil pickle":
        write_batches(folder / data.BATCHES)
        (folder / data.BATCHES / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
        return "cifar10"
    x_train, y_train, x_test, y_test = arrays("mnist")
    if how == "no zip":
        (folder / "mnist.npz").write_bytes(b"PK\3\4 but no more")
    elif how == "missing array":
        np.savez(folder / "mnist.npz", x_train=x_train)
    else:
        wrong = {"shape": x_train[:, 1:], "dtype": x_train / 255, "label": x_train}[how]
        y_train = y_train + 90 if how == "label" else y_train
        values = (wrong, y_train, x_test, y_test)
        np.savez(folder / "mnist.npz", **dict(zip(data.NPZ, values, strict=True)))
    return "mnist"


@pytest.mark.parametrize(
    "how",
    [
        *("empty", "truncated idx", "no idx", "missing labels", "evil pickle"),
        *("no zip", "missing array", "shape", "dtype", "label"),
    ],
)
def test_broken_data_is_refused_in_one_line(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = broken(tmp_path, how)
    options = [*TINY, "--data", name, "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    message = refusal(["rotated", *options], capsys)
    assert message.startswith(f"error: {name}: expected ")
    assert ", got " in message


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--train-images", "0"], "--train-images: expected at least 1, got 0"),
        (["--step", "60"], "--step: expected degrees above 0 and below 45"),
        (["--lr", "nan"], "--lr: expected a number above 0, got nan"),
        (["--data-dir", "."], "--data-dir: expected none with --data digits"),
        (["--out", __file__], "--out: expected a folder to write to"),
        (["--data", "mnist", "--data-dir", "nowhere"], "got no such folder"),
    ],
)
def test_bad_options_fail_before_training(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotated, "repeat", None)
    assert message in refusal(["rotated", "--out", str(tmp_path), *options], capsys)


def test_interrupt_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rotated, "repeat", interrupted)
    assert main(["rotated", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_interval_is_students() -> None:
    band = report.interval([1.0, 2.0, 3.0])
    assert band.mean == 2
    assert band.half == pytest.approx(4.302653 / 3**0.5)
    assert f"{band}" == "2.0 ± 2.5"
    assert f"{report.interval([5.0]):+}" == "+5.0"
