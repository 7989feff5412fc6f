"""Two sets of five classes under a fixed affine switch, against a task input, by network size.

The experiment of "Neuromodulator-inspired task switching using a fixed weight-space
transformation" on MNIST's digits 0 to 4 and 5 to 9, which share five outputs. Network, optimizer
and the modulator (a Hadamard rotation, of O(n) memory) are our choice: the paper does not state
them. All seeds of a size train as one batched computation: a row of the weights is a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.papers import report
from benchmarks.papers.data import Images, Inputs, load
from benchmarks.papers.resume import Kept
from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch import Hadamard
from neuromod_ext.plotting.switch import plot_accuracy_by_size

Model = Literal["extra input", "switch"]
MODELS: tuple[Model, ...] = ("extra input", "switch")
CHANNELS = (8, 20)
CLASSES = 5
WHERE = ("data_dir", "out", "fresh")  # what results do not depend on
DIFFERENCE = "switch − extra input"


@dataclass
class SwitchedDigits:
    """Digits 0 to 4 and 5 to 9 with one small CNN: accuracy against its number of parameters.

    The switch (state 1 has all weights rotated, all biases shifted; both states learn in each
    batch, through the rotation's transpose) against the same CNN with the task as one more,
    constant input channel. Finished networks are kept: after an interruption the same command
    goes on, also with other sizes.
    """

    data: Literal["digits", "mnist"] = "digits"
    """Images: scikit-learn's 1797 digits (a quarter for the test) or MNIST."""
    data_dir: Path | None = None
    """Folder with mnist.npz or MNIST's IDX files; without it, MNIST comes from openml.org."""
    train_images: int | None = None
    """At most so many training images."""
    hidden: tuple[int, ...] = (1, 2, 4, 7, 10, 20, 50, 100)
    """Hidden sizes."""
    seeds: int = 5
    """Repetitions; each draws split, weights, modulator and batches anew."""
    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 64
    """Images of each task in a training step."""
    lr: float = 0.003
    """Adam's first learning rate, for both models; a cosine takes it to 0."""
    shift: float = 0.1
    """Standard deviation of the shift of the biases."""
    threads: int = 2
    """Threads of torch."""
    out: Path = Path("figures")
    """Folder for the figure and the JSON."""
    fresh: bool = False
    """Forget an unfinished run."""

    if_interrupted: ClassVar[str] = "finished networks are kept, the same command goes on"

    def run(self, console: Console) -> None:
        """Train and test all sizes, print the table, write the figure and the JSON."""
        for name in ("seeds", "epochs", "batch_size", "threads"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise report.Failure(f"--{option}: expected at least 1, got {getattr(self, name)}")
        if not self.hidden or min(self.hidden) < 1:
            raise report.Failure(f"--hidden: expected sizes of at least 1, got {self.hidden}")
        report.prepare(self.out)
        torch.set_num_threads(self.threads)
        tasks = Tasks.load(self)
        config = {n: v for n, v in asdict(self).items() if n not in WHERE}
        options = {n: v for n, v in config.items() if n not in ("hidden", "threads")}
        kept = Kept(self.out / f"switch-classes-{self.data}.unfinished", options, fresh=self.fresh)
        record: dict[str, Any] = {
            "experiment": "switch-classes",
            "config": config,
            "environment": report.environment(),
            "channels": CHANNELS,
            "runs": [],
        }
        for hidden in self.hidden:
            for model in MODELS:
                part = f"{model.replace(' ', '-')}-{hidden}"
                run = kept.load(part)
                if run is None:
                    run = self._learn(model, hidden, tasks)
                    kept.save(part, run)
                record["runs"].append(run)
                mean = report.interval(np.mean(run["accuracy_by_seed_and_task"], axis=1))
                console.print(f"hidden {hidden}, {model}: {mean} %", soft_wrap=True)
        record["summary"] = summarise(record)
        record["crossings"] = crossings(record["summary"])
        record["seconds"] = sum(run["seconds"] for run in record["runs"])
        console.print(table(record))
        for path in report.write(record, {"accuracy": figure(record)}, self.out):
            console.print(str(path), soft_wrap=True)
        kept.forget()

    def _learn(self, model: Model, hidden: int, tasks: Tasks) -> dict[str, Any]:
        """Train and test all seeds of one model and size."""
        began = time.perf_counter()
        nets = Networks(model, tasks.side, hidden, self.seeds, self.shift)
        for _ in train(nets, tasks, self):
            pass
        return {
            "model": model,
            "hidden": hidden,
            "parameters": nets.w.shape[1] + nets.b.shape[1],
            "accuracy_by_seed_and_task": nets.accuracy(tasks).tolist(),
            "seconds": time.perf_counter() - began,
        }


@dataclass
class Tasks:
    """Images of all seeds, prepared as the first layer's patches.

    Attributes:
        train: By seed and task, patches [N, P, 9] and labels [N], 0 to 4.
        test: Likewise.
        side: Of the images.
    """

    train: list[list[tuple[Tensor, Tensor]]]
    test: list[list[tuple[Tensor, Tensor]]]
    side: int

    @classmethod
    def load(cls, config: SwitchedDigits) -> Tasks:
        """Split each seed's images into digits 0 to 4 and digits 5 to 9."""
        images = load(config.data, config.data_dir)
        train, test = [], []
        for seed in range(config.seeds):
            for images_of, parts in zip(
                (train, test), images.split(seed, config.train_images), strict=True
            ):
                if images_of is train:
                    inputs = Inputs.like(parts)
                images_of.append([_task(parts, inputs, task) for task in range(2)])
        return cls(train, test, images.train.x.shape[-1])


def _task(images: Images, inputs: Inputs, task: int) -> tuple[Tensor, Tensor]:
    mine = images.y // CLASSES == task
    x = (images.x[mine] - inputs.mean) / inputs.std
    return patches(x), images.y[mine] % CLASSES


def patches(x: Tensor) -> Tensor:
    """The 3 x 3 windows of images [N, C, H, W] at stride 2 with zeros around: [N, P, 9 C]."""
    return F.unfold(x, 3, padding=1, stride=2).mT.contiguous()


class Networks:
    """S CNNs of one size, and the two states or task inputs of each.

    Attributes:
        w: All weights, [S, n].
        b: All biases, [S, m].
    """

    def __init__(self, model: Model, side: int, hidden: int, seeds: int, shift: float) -> None:
        first, second = CHANNELS
        self.model, self.side = model, (side + 1) // 2
        inputs = 9 if model == "switch" else 18
        features = second * ((self.side + 1) // 2) ** 2
        self.shapes = [(first, inputs), (second, 9 * first), (hidden, features), (CLASSES, hidden)]
        sizes = [o * i for o, i in self.shapes]
        rows, shifts = [], []
        for seed in range(seeds):
            stream = Seeded(seed)
            # He's deviation (our choice)
            rows.append(
                torch.cat(
                    [
                        torch.from_numpy(stream.normal(o * i)) * math.sqrt(2 / i)
                        for o, i in self.shapes
                    ]
                )
            )
            shifts.append(torch.from_numpy(stream.normal(sum(o for o, _ in self.shapes))) * shift)
        self.w = torch.stack(rows).float().requires_grad_()
        self.v = torch.stack(shifts).float()
        self.b = torch.zeros_like(self.v).requires_grad_()
        self.modulators = [Hadamard(sum(sizes), seed) for seed in range(seeds)]

    def states(self) -> tuple[Tensor, Tensor]:
        """Weights and biases of both tasks, [2 S, n] and [2 S, m]: task 0 of all seeds first."""
        w, b = self.w, self.b
        if self.model == "extra input":
            return torch.cat((w, w)), torch.cat((b, b))
        moved = torch.stack([m(row) for m, row in zip(self.modulators, w, strict=True)])
        return torch.cat((w, moved)), torch.cat((b, b + self.v))

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [2 S, N, 5] of patches [2 S, N, P, 9]."""
        w, b = self.states()
        runs, images = x.shape[:2]
        if self.model == "extra input":
            task = torch.ones_like(x)
            task[: runs // 2] = 0
            x = torch.cat((x, task), -1)
        weights = w.split([o * i for o, i in self.shapes], 1)
        biases = b.split([o for o, _ in self.shapes], 1)

        def linear(x: Tensor, layer: int) -> Tensor:
            weight = weights[layer].view(runs, *self.shapes[layer])
            return torch.baddbmm(biases[layer].unsqueeze(1), x, weight.mT)

        x = linear(x.flatten(1, 2), 0).relu()  # [2 S, N P, C]
        x = x.view(runs * images, self.side, self.side, -1).permute(0, 3, 1, 2)
        x = patches(x).view(runs, -1, self.shapes[1][1])
        x = linear(x, 1).relu().view(runs, images, -1)
        return linear(linear(x, 2).relu(), 3)

    @torch.no_grad()
    def accuracy(self, tasks: Tasks) -> Tensor:
        """Share of the test images classified rightly, in percent, [S, 2]."""
        count = min(len(y) for seed in tasks.test for _, y in seed)
        found = []
        for chunk in torch.arange(count).split(250):  # few enough for a cache
            x, y = batch(tasks.test, [[chunk] * 2] * len(tasks.test))
            found.append((self(x).argmax(2) == y).float())
        return 100 * torch.cat(found, 1).mean(1).view(2, -1).T


def batch(
    images: list[list[tuple[Tensor, Tensor]]], index: list[list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Images and labels, [2 S, N, ...], task 0 of all seeds first."""
    chosen = [
        (images[seed][task][0][index[seed][task]], images[seed][task][1][index[seed][task]])
        for task in range(2)
        for seed in range(len(images))
    ]
    x, y = zip(*chosen, strict=True)
    return torch.stack(x), torch.stack(y)


def train(nets: Networks, tasks: Tasks, config: SwitchedDigits) -> Iterator[float]:
    """Train all seeds; yield the mean loss of each step."""
    smallest = min(len(y) for seed in tasks.train for _, y in seed)
    size = min(config.batch_size, smallest)
    steps = smallest // size
    optimizer = torch.optim.Adam([nets.w, nets.b], lr=config.lr)  # element by element
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    generators = [torch.Generator().manual_seed(seed) for seed in range(config.seeds)]
    for _ in range(config.epochs):
        orders = [
            [torch.randperm(len(y), generator=generator) for _, y in seed]
            for generator, seed in zip(generators, tasks.train, strict=True)
        ]
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            x, y = batch(tasks.train, [[order[part] for order in seed] for seed in orders])
            losses = F.cross_entropy(nets(x).permute(0, 2, 1), y, reduction="none").mean(1)
            optimizer.zero_grad()
            losses.sum().backward()  # runs do not meet
            optimizer.step()
            schedule.step()
            yield losses.mean().item()


def summarise(record: dict[str, Any]) -> list[dict[str, Any]]:
    """By hidden size: both models' means and medians, and the difference paired by seed.

    A mean says little where some of the starts do not learn; the median says what the others do.
    """
    rows = []
    for hidden in record["config"]["hidden"]:
        runs = {run["model"]: run for run in record["runs"] if run["hidden"] == hidden}
        means = {
            name: np.mean(run["accuracy_by_seed_and_task"], axis=1) for name, run in runs.items()
        }
        rows.append(
            {
                "hidden": hidden,
                "parameters": {name: run["parameters"] for name, run in runs.items()},
                **{name: report.interval(mean) for name, mean in means.items()},
                "median": {name: float(np.median(mean)) for name, mean in means.items()},
                DIFFERENCE: report.interval(means["switch"] - means["extra input"]),
            }
        )
    return rows


def crossings(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Where the better model changes with size, in parameters of the switch.

    Only sizes at which the 95 % interval of the paired difference leaves out 0 tell which is the
    better; a crossing lies between two such neighbours.
    """
    clear = [row for row in rows if abs(row[DIFFERENCE].mean) > row[DIFFERENCE].half]
    return [
        {"above": a["parameters"]["switch"], "below": b["parameters"]["switch"]}
        for a, b in pairwise(clear)
        if (a[DIFFERENCE].mean > 0) != (b[DIFFERENCE].mean > 0)
    ]


def table(record: dict[str, Any]) -> Table:
    """The results, for a terminal."""
    config = record["config"]
    found = [f"{c['above']:,} and {c['below']:,}" for c in record["crossings"]]
    where = "show no crossing"
    if found:
        where = f"cross between {' and between '.join(found)} parameters"
    sheet = Table(
        title=f"Digits 0 to 4 and 5 to 9, {config['data']}: test accuracy in %",
        caption=f"Mean of both tasks ± 95 % t-interval over {config['seeds']} seeds "
        f"(median); as far as these tell, the curves {where}.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    for title in ("hidden", "parameters", *MODELS, DIFFERENCE):
        sheet.add_column(title, justify="right")
    for row in record["summary"]:
        cells = (f"{row[model]} ({row['median'][model]:.1f})" for model in MODELS)
        count = f"{row['parameters']['switch']:,}"
        sheet.add_row(str(row["hidden"]), count, *cells, f"{row[DIFFERENCE]:+}")
    return sheet


def figure(record: dict[str, Any]) -> Any:
    """Accuracy against the number of parameters."""
    rows = record["summary"]
    return plot_accuracy_by_size(
        {model: [row["parameters"][model] for row in rows] for model in MODELS},
        {
            model: ([row[model].mean for row in rows], [row[model].half for row in rows])
            for model in MODELS
        },
        {
            model: [
                np.mean(run["accuracy_by_seed_and_task"], axis=1)
                for run in record["runs"]
                if run["model"] == model
            ]
            for model in MODELS
        },
        title=f"Two tasks of five digits, {record['config']['seeds']} seeds",
    )
