"""Streams of tasks, learned by contexts that modulate one network of fixed random weights.

The experiments of Hong and Pavlic, "Randomly Weighted Neuromodulation in Neural Networks
Facilitates Learning of Manifolds Common Across Tasks". Baselines and smaller data are our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.console import Console

from benchmarks.papers import contexts, report
from benchmarks.papers import random_weights_report as drawing
from benchmarks.papers.data import Images, ImageSet, load
from benchmarks.papers.learners import MODELS, Fly, Learner, Repetition, Sizes, learn
from benchmarks.papers.resume import Kept
from neuromod_ext import continual
from neuromod_ext.continual import TaskStream

StreamName = Literal["rotation", "shift-1px", "shift-2px", "augment"]
ModelName = Literal["fly", "layers", "sequential", "separate", "linear"]

# Called with images, and with a seed for what is random in the images themselves.
STREAMS: dict[StreamName, Callable[[Images, int], TaskStream]] = {
    "rotation": lambda images, seed: continual.RotationMNIST(images.x, images.y),
    "shift-1px": lambda images, seed: continual.ShiftMNIST(images.x, images.y),
    "shift-2px": lambda images, seed: continual.ShiftMNIST(images.x, images.y, pixels=2),
    "augment": lambda images, seed: continual.AugmentMNIST(images.x, images.y, seed=seed),
}

BATCH = {"digits": 32, "mnist": 128}


@dataclass
class RandomWeights:
    """Random weights under contexts: streams of tasks learned without forgetting.

    A wide network of fixed random weights learns task after task, each by a context of its own (a
    gain of every hidden unit, and a strength). Beside it: dense random layers, each modulated in
    the same way; an MLP that learns task after task over
    the last, as large as all contexts together; such an MLP for each task; and softmax regression
    for each task. Contexts are compared before and after training, and so are the representations
    of points; inputs are reconstructed. Finished tasks are kept: after an interruption the same
    command goes on.
    """

    data: Literal["digits", "mnist"] = "digits"
    """Images: scikit-learn's 1797 digits (a quarter for the test), or MNIST."""
    data_dir: Path | None = None
    """Folder with mnist.npz or the IDX files; without it, MNIST comes from openml.org."""
    streams: tuple[StreamName, ...] = tuple(STREAMS)
    """Rotations by 10°, lateral shifts by one or two pixels, augmentations (they need kornia)."""
    models: tuple[ModelName, ...] = tuple(MODELS)
    """The contexts' network (fly) and its baselines."""
    train_images: int | None = None
    """At most so many training images."""
    test_images: int | None = None
    """At most so many test images."""
    tasks: int | None = None
    """At most so many tasks of each stream."""
    units: int | None = None
    """Hidden units of the fly's network; without it 10 for each pixel, as in the paper."""
    seeds: int = 1
    """Repetitions; each draws split, weights, contexts and order of the images anew."""
    epochs: int = 3
    """Passes over the training images of each task."""
    batch_size: int | None = None
    """Images in a training step; without it 128 of MNIST, as in the paper, and 32 of the digits."""
    pairs: int = 100
    """Test images of each class and task whose pairs the histograms count."""
    dense_steps: int = 20
    """Training steps that are timed against dense code; 0 leaves that out."""
    threads: int = 1
    """Threads of torch."""
    out: Path = Path("figures")
    """Folder for the figures, the JSON and the report."""
    fresh: bool = False
    """Forget an unfinished run."""
    draw: bool = False
    """Train nothing; draw figures and report anew from the JSON that is there."""

    if_interrupted: ClassVar[str] = "finished tasks are kept, the same command goes on"

    def run(self, console: Console) -> None:
        """Learn all streams; write a JSON with its figures for each, and one report."""
        self._check()
        report.prepare(self.out)
        if not self.draw:
            self._learn(console)
        for path in drawing.draw(self.out, self.data):
            console.print(str(path), soft_wrap=True)

    def _learn(self, console: Console) -> None:
        torch.set_num_threads(self.threads)
        images = load(self.data, self.data_dir)
        folder = self.out / f"random-weights-{self.data}.unfinished"
        kept = Kept(folder, self._options(), fresh=self.fresh)
        one = images.train.take(slice(1))
        streams = {name: self._first(STREAMS[name](one, 0)) for name in self.streams}
        total = sum(map(len, streams.values())) * self.seeds * len(self.models) * self.epochs
        with report.progress(console) as progress:
            bar = progress.add_task("", total=total)
            for name, stream in streams.items():
                record = self._record(name, stream)
                for seed in range(self.seeds):
                    repetition = self._repetition(name, images, seed)
                    for model in self.models:
                        progress.update(bar, description=f"{name}, seed {seed}: {model}")
                        advance = partial(progress.advance, bar)
                        learner, state = learn(model, repetition, self._fit(), kept, advance)
                        self._take_in(record, seed, model, repetition, learner, state)
                report.write(record, {}, self.out)
                console.print(f"{name}: {drawing.line(record)}", soft_wrap=True)
        kept.forget()

    def _repetition(self, name: StreamName, images: ImageSet, seed: int) -> Repetition:
        train_set, test_set = images.split(seed, self.train_images)
        test_set = test_set.take(slice(self.test_images))
        train = self._first(STREAMS[name](train_set, 2 * seed))
        test = self._first(STREAMS[name](test_set, 2 * seed + 1))
        pixels = train_set.x[0].numel()
        sizes = Sizes(pixels, self.units or 10 * pixels, len(train))
        number = 1000 * (1 + list(STREAMS).index(name)) + seed  # no stream shares another's seeds
        return Repetition(f"{name}-{seed}", train, test, sizes, number)

    def _first(self, stream: TaskStream) -> TaskStream:
        return stream if self.tasks is None else stream.take(self.tasks)

    def _take_in(
        self,
        record: dict[str, Any],
        seed: int,
        model: ModelName,
        repetition: Repetition,
        learner: Learner,
        state: dict[str, Any],
    ) -> None:
        """Add what a model has learned to a record."""
        tasks = len(repetition.train)
        matrix = [[100 * accuracy for accuracy in row] for row in state["rows"]]
        filled = continual.accuracy_matrix(matrix)
        record["runs"].append(
            {
                "model": model,
                "seed": seed,
                "parameters_per_task": continual.parameters_per_task(learner.modules, tasks),
                "average_accuracy": continual.average_accuracy(filled),
                "forgetting": continual.forgetting(filled),
                "tasks_changed_later": state["changed"],
                "matrix": matrix,
            }
        )
        timing = {"model": model, "seed": seed, "seconds_by_task": state["seconds"]}
        record["timing"]["runs"].append(timing)
        if isinstance(learner, Fly):
            pairs = self.pairs if seed == 0 else 0
            record["contexts"].append(contexts.analyse(learner, repetition, pairs))
            if seed == 0 and self.dense_steps:
                found = contexts.speed(
                    learner, repetition, self._fit()["batch_size"], self.dense_steps
                )
                record["timing"]["step"] = found

    def _fit(self) -> dict[str, int]:
        return {"epochs": self.epochs, "batch_size": self.batch_size or BATCH[self.data]}

    def _options(self) -> dict[str, Any]:
        """What results depend on."""
        where = ("out", "fresh", "draw", "data_dir")
        return {name: value for name, value in asdict(self).items() if name not in where}

    def _record(self, name: StreamName, stream: TaskStream) -> dict[str, Any]:
        return {
            "experiment": f"random-weights-{name}",
            "config": self._options(),
            "stream": {"name": name, "tasks": stream.names, "closed": stream.closed},
            "runs": [],
            "contexts": [],
            "timing": {"runs": []},
            "environment": report.environment(),
        }

    def _check(self) -> None:
        # The T-GSH score leaves out a task, and needs two classes.
        least = {"tasks": 3, "dense_steps": 0, "test_images": 50}
        counts = ("train_images", "units", "seeds", "epochs", "batch_size", "pairs")
        for name in (*counts, *least, "threads"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                option = name.replace("_", "-")
                raise report.Failure(
                    f"--{option}: expected at least {least.get(name, 1)}, got {value}"
                )
        if "augment" in self.streams and not self.draw:
            try:
                continual.augmentations((1, 1))
            except ImportError as error:
                raise report.Failure(f"--streams: {error}, or leave augment out") from error
