"""Rotated images: a ring of weights against the angle as an input, and against no angle.

The experiment of Benjamin et al., "Walking the Weight Manifold": a CNN trained at few angles and
tested at all. Architecture, schedule, learning rates and the smaller data sets are our choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import neuromod_ext as nm
from benchmarks.papers import models, report
from benchmarks.papers.data import Images, ImageSet, Inputs, Name, load
from neuromod_ext import plotting


class Variant(NamedTuple):
    """How the model of a row is made and trained."""

    build: Callable[[int, int], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float


# For each model the best of 0.015, 0.03, 0.06 and 0.12 by accuracy at the seen angles, on a quarter
# of the digits' training images held out; means of three seeds.
VARIANTS = {
    "ring": Variant(models.ring, nm.optim.ManifoldSGD, 0.03),
    "concatenated": Variant(models.Concatenated, torch.optim.SGD, 0.06),
    "concatenated (wide)": Variant(models.concatenated_wide, torch.optim.SGD, 0.06),
    "no angle": Variant(models.Unconditioned, torch.optim.SGD, 0.06),
}
MOMENTUM = 0.9
WEIGHT_DECAY = 0.003


@dataclass
class Rotated:
    """Rotated images: a CNN trained at few angles and tested at all.

    A ring of weights (every weight on an ellipse, the angle its phase) against the same CNN with
    the angle's cosine and sine as input channels, that CNN widened to the ring's number of
    parameters, and the same CNN without the angle. All are trained alike, by momentum SGD with a
    cosine schedule; the ring's steps are taken in the metric of its manifold.
    """

    data: Name = "digits"
    """Images: scikit-learn's 1797 digits (a quarter for the test), MNIST or CIFAR-10."""
    data_dir: Path | None = None
    """Folder with mnist.npz or cifar10.npz (x_train, y_train, x_test, y_test), with MNIST's IDX
    files, or with cifar-10-batches-py. Without it, MNIST and CIFAR-10 come from openml.org."""
    train_images: int | None = None
    """At most so many training images."""
    test_images: int | None = None
    """At most so many test images."""
    angles: int = 8
    """Number of angles in training, equally spaced from 0°."""
    step: float = 5.0
    """Distance of the angles in the test, in degrees."""
    seeds: int = 5
    """Repetitions; each draws split, weights and order of the images anew."""
    epochs: int = 24
    """Passes over the training images, each image at a random seen angle in each."""
    batch_size: int = 64
    """Images in a training step."""
    lr: float | None = None
    """Learning rate for all models, in place of the best of a small grid for each."""
    width: int = 16
    """Channels of the first convolution."""
    threads: int = 1
    """Threads of torch; more than one pays for larger images only."""
    out: Path = Path("figures")
    """Folder for the figures and the JSON."""

    def run(self, console: Console) -> None:
        """Train and test all models, print the table, write the figures and the JSON."""
        start = time.perf_counter()
        self._check()
        report.prepare(self.out)
        torch.set_num_threads(self.threads)
        images = load(self.data, self.data_dir)
        record = self._record()
        with report.progress(console) as progress:
            task = progress.add_task("", total=self.seeds * len(VARIANTS) * self.epochs)
            for seed in range(self.seeds):
                name = f"seed {seed + 1} of {self.seeds}"
                for doing, epochs in repeat(self, seed, images, record):
                    progress.update(task, description=f"{name}: {doing}", advance=epochs)
                last = (f"{n} {a[-1]:.1f}" for n, a in accuracies(record, "unseen").items())
                console.print(f"{name}, % at unseen angles: {', '.join(last)}", soft_wrap=True)
        record["summary"] = summarise(record)
        record["seconds"] = time.perf_counter() - start
        console.print(table(record))
        for path in report.write(record, figures(record), self.out):
            console.print(str(path), soft_wrap=True)

    def _check(self) -> None:
        counts = {"angles", "seeds", "epochs", "batch_size", "width", "threads"}
        for name in counts | {"train_images", "test_images"}:
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise report.Failure(f"--{option}: expected at least 1, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise report.Failure(f"--lr: expected a number above 0, got {self.lr}")
        apart = 360 / self.angles
        if not 0 < self.step < apart:
            raise report.Failure(
                f"--step: expected degrees above 0 and below {apart:g}, the distance of "
                f"{self.angles} angles of training, got {self.step:g}"
            )

    def _record(self) -> dict[str, Any]:
        seen = [round(360 * i / self.angles, 9) for i in range(self.angles)]
        grid = [round(self.step * i, 9) for i in range(math.ceil(360 / self.step - 1e-9))]
        return {
            "experiment": "rotated",
            "config": asdict(self),
            "optimizer": {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
            "environment": report.environment(),
            "seen": seen,
            "angles": sorted({*seen, *grid}),
            "runs": [],
            "snapshots": {},
        }


def repeat(
    config: Rotated, seed: int, images: ImageSet, record: dict[str, Any]
) -> Iterator[tuple[str, int]]:
    """Train and test every model once; yield what is being done and the epochs done since."""
    train_set, test_set = images.split(seed, config.train_images)
    test_set = test_set.take(slice(config.test_images))
    inputs = Inputs.like(train_set)
    trained: dict[str, nn.Module] = {}
    for name, variant in VARIANTS.items():
        torch.manual_seed(seed)
        trained[name] = model = variant.build(train_set.x.shape[1], config.width)
        lr = variant.lr if config.lr is None else config.lr
        optimizer = variant.optimizer(
            model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        start = time.perf_counter()
        for epoch in train(model, optimizer, train_set, inputs, config, record["seen"], seed):
            if name == "ring" and seed == 0 and (epoch.bit_count() < 2 or epoch == config.epochs):
                record["snapshots"][epoch] = next(model.parameters()).detach().clone()
            yield name, int(epoch > 0)
        seconds = time.perf_counter() - start
        record["runs"].append(
            {
                "model": name,
                "seed": seed,
                "parameters": models.size(model),
                "lr": lr,
                "train_samples_per_second": config.epochs * len(train_set) / seconds,
            }
        )
    yield "testing all angles", 0
    accuracy = evaluate(trained, test_set, inputs, record["angles"])
    for run in record["runs"][-len(trained) :]:
        run["accuracy"] = accuracy[run["model"]]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    inputs: Inputs,
    config: Rotated,
    seen: list[float],
    seed: int,
) -> Iterator[int]:
    """Train a model; yield the number of epochs done, 0 first."""
    generator = torch.Generator().manual_seed(seed)  # the same batches for every model
    steps = math.ceil(len(images) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    yield 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator)
        at = torch.randint(len(seen), (len(images),), generator=generator)
        angles = torch.tensor(seen)[at]
        # Parts of equal size: a small last batch would make a large, noisy step.
        for batch, degrees in zip(
            order.tensor_split(steps), angles.tensor_split(steps), strict=True
        ):
            output = model(inputs(images.x[batch], degrees), degrees / 360)
            loss = F.cross_entropy(output, images.y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch + 1


@torch.no_grad()
def evaluate(
    trained: dict[str, nn.Module], images: Images, inputs: Inputs, angles: list[float]
) -> dict[str, list[float]]:
    """Accuracy in percent of every model, of all images at each angle."""
    correct = {name: [0] * len(angles) for name in trained}
    for chunk in torch.arange(len(images)).split(250):  # few enough for a cache
        x, y = images.x[chunk], images.y[chunk]
        for i, angle in enumerate(angles):
            rotated = inputs(x, angle)
            turns = torch.tensor(angle / 360)  # one for all, so that W(s) is folded once
            for name, model in trained.items():
                correct[name][i] += int((model(rotated, turns).argmax(1) == y).sum())
    return {name: [100 * n / len(images) for n in counts] for name, counts in correct.items()}


def accuracies(record: dict[str, Any], at: str) -> dict[str, np.ndarray]:
    """Mean accuracy of each run, [seeds], at the 'seen' angles or at the 'unseen', all others."""
    chosen = np.isin(record["angles"], record["seen"], invert=at == "unseen")
    return {
        name: rows[:, chosen].mean(1) for name, rows in report.by_model(record, "accuracy").items()
    }


def summarise(record: dict[str, Any]) -> dict[str, dict[str, report.Interval]]:
    """The table's numbers: of each model, and differences paired by seed."""
    columns = {at: accuracies(record, at) for at in ("seen", "unseen")}
    rate = report.by_model(record, "train_samples_per_second")
    rows = {
        name: {at: report.interval(column[name]) for at, column in columns.items()}
        | {"train_samples_per_second": report.interval(rate[name])}
        for name in VARIANTS
    }
    for name in [name for name in VARIANTS if name != "ring"]:
        rows[f"ring − {name}"] = {
            at: report.interval(column["ring"] - column[name]) for at, column in columns.items()
        }
    return rows


def table(record: dict[str, Any]) -> Table:
    """The results, for a terminal."""
    seeds, seen = record["config"]["seeds"], len(record["seen"])
    sheet = Table(
        title=f"Rotated {record['config']['data']}: test accuracy in %",
        caption=f"Mean ± 95 % t-interval over {seeds} seeds, differences paired by seed. "
        f"{seen} seen angles, {len(record['angles']) - seen} unseen. The ring is the equal CNN "
        "with 3 basis points in place of each weight; at one angle it folds to the CNN of 'no "
        f"angle'. Samples/s: in training, with threads: {record['config']['threads']}, on "
        f"{record['environment']['cpu']}.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for title in ("", "parameters", "seen", "unseen", "samples/s"):
        sheet.add_column(title, justify="right" if title else "left", no_wrap=True)
    parameters = report.by_model(record, "parameters")
    for name, row in record["summary"].items():
        if name in VARIANTS:
            rate = f"{row['train_samples_per_second'].mean:,.0f}"
            cells = f"{parameters[name][0]:,}", f"{row['seen']}", f"{row['unseen']}", rate
        else:
            cells = "", f"{row['seen']:+}", f"{row['unseen']:+}", ""
        sheet.add_row(name, *cells)
        if name == list(VARIANTS)[-1]:
            sheet.add_row()
    return sheet


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against the angle, and the path of the ring."""
    bands = {
        name: report.interval(runs) for name, runs in report.by_model(record, "accuracy").items()
    }
    name, seeds = record["config"]["data"], record["config"]["seeds"]
    return {
        "accuracy": plotting.plot_accuracy(
            record["angles"],
            {name: (band.mean, band.half) for name, band in bands.items()},
            record["seen"],
            title=f"Rotated {name}, mean and 95 % interval over {seeds} seeds",
        ),
        "ring": plotting.plot_manifold_path(
            record["snapshots"],
            nm.Ellipse(),
            marks={f"{angle:.3g}°": angle / 360 for angle in record["seen"]},
            title="First-layer kernels of the ring, marked by angle, as training moves them",
        ),
    }
