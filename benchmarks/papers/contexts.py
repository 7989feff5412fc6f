"""What the contexts of the fly's network have learned, and what a training step takes."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.papers.learners import CLASSES, MODELS, Fly, Repetition
from neuromod_ext import analysis

DIGITS = (3, 1)  # those whose reconstructions the paper shows
COLUMNS = 9  # tasks whose reconstructions are drawn
CHUNK = 500  # images at a time


@torch.no_grad()
def analyse(fly: Fly, repetition: Repetition, pairs: int) -> dict[str, Any]:
    """Compare contexts and representations before and after training.

    Args:
        fly: After training.
        repetition: What it has learned.
        pairs: Test images of each class and task for histograms; 0 leaves histograms and
            reconstructions out.
    """
    tasks = len(repetition.test)
    gains = {"before": repetition.untrained().gains(), "after": fly.gains()}
    similar = {when: analysis.context_similarity(gain) for when, gain in gains.items()}
    closed = repetition.test.closed
    found: dict[str, Any] = {
        "similarity": {when: matrix.tolist() for when, matrix in similar.items()},
        "neighbour_share": {
            when: analysis.neighbour_share(matrix, closed=closed)
            for when, matrix in similar.items()
        },
    }
    points = {when: analysis.PairSimilarity(tasks, CLASSES) for when in gains}
    chosen: dict[tuple[int, int], Tensor] = {}
    for t, task in enumerate(repetition.test):
        for inputs, label in zip(task.inputs.split(CHUNK), task.labels.split(CHUNK), strict=True):
            hidden = fly.hidden(inputs)
            for when, gain in gains.items():
                points[when].update(hidden * gain[t], t, label)
        for c in range(CLASSES):
            chosen[t, c] = task.inputs[task.labels == c][:pairs]
    found["t_gsh"] = {when: point.score()._asdict() for when, point in points.items()}
    if pairs:
        found["histograms"] = {
            when: _plain(
                analysis.similarity_histogram(
                    lambda t, c, gain=gain: fly.hidden(chosen[t, c]) * gain[t],
                    range(tasks),
                    range(CLASSES),
                )
            )
            for when, gain in gains.items()
        }
        found["reconstructions"] = reconstruct(fly, repetition, gains["after"])
    return found


def reconstruct(fly: Fly, repetition: Repetition, gains: Tensor) -> dict[str, Any]:
    """Images of some digits in some tasks, [digits, tasks, H, W], from the contexts alone."""
    tasks = len(gains)
    noise = torch.Generator().manual_seed(repetition.number)
    images = analysis.reconstruct(
        fly.index, repetition.sizes.inputs, fly.readout, gains, generator=noise
    )
    means = torch.stack(
        [
            torch.stack([task.inputs[task.labels == c].double().mean(0) for c in range(CLASSES)])
            for task in repetition.test
        ]
    ).flatten(2)
    columns = min(COLUMNS, tasks)
    shown = [i * tasks // columns for i in range(columns)]
    table = images[shown][:, list(DIGITS)].transpose(0, 1)
    return {
        "digits": DIGITS,
        "tasks": [repetition.test.names[t] for t in shown],
        "images": table.unflatten(2, repetition.test.images.shape[-2:]).round(decimals=5).tolist(),
        "class_found": best_match_share(images, means),
        "task_found": best_match_share(images.transpose(0, 1), means.transpose(0, 1)),
    }


def best_match_share(images: Tensor, means: Tensor) -> float:
    """Share of images [A, B, I] whose best match among the B means of their row is their own.

    The match is the cosine of what sets image and mean apart from the average of their row.
    """
    apart = [F.normalize(x - x.nanmean(1, keepdim=True), dim=2) for x in (images, means)]
    match = (apart[0] @ apart[1].mT).nan_to_num(-1)  # a class without a test image has no mean
    return float((match.argmax(2) == torch.arange(match.shape[2])).double().mean())


class Dense(nn.Module):
    """The fly's network for one task, as dense code has it: the hash is a product."""

    dense: Tensor
    readout: Tensor

    def __init__(self, fly: Fly, inputs: int) -> None:
        super().__init__()
        dense = torch.zeros(len(fly.index), inputs).scatter_(1, fly.index, 1.0)
        self.register_buffer("dense", dense)
        self.register_buffer("readout", fly.readout.clone())
        self.context = nn.Parameter(fly.gains()[0].clone())
        self.strength = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Classify inputs, [B, C, H, W]."""
        hidden = F.linear(inputs.flatten(1), self.dense)
        hidden = F.relu(hidden - hidden.mean(1, keepdim=True)) * self.context
        return F.linear(hidden, self.strength * self.readout)


def speed(fly: Fly, repetition: Repetition, batch_size: int, steps: int) -> dict[str, Any]:
    """Median seconds of a training step, of the library and of dense code in turns."""
    model, task = MODELS["fly"], repetition.train[0]
    new = repetition.learner("fly")
    repetition.begin(new, 0)
    dense = Dense(fly, repetition.sizes.inputs)
    rivals = {
        "library": (lambda x: new.logits(0, x), list(new.parameters(0))),
        "dense": (dense, list(dense.parameters())),
    }
    optimizers = {
        name: model.optimizer(parameters, lr=model.lr) for name, (_, parameters) in rivals.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    places = torch.arange(len(task)).split(batch_size)
    for batch in islice((p for _ in range(steps + 3) for p in places), steps + 3):
        inputs, labels = task[batch]
        for name, (logits, _) in rivals.items():
            start = time.perf_counter()
            loss = F.cross_entropy(logits(inputs), labels)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(torch.tensor(times[3:]).median()) for name, times in seconds.items()}
    return {
        "batch_size": batch_size,
        "seconds": medians,
        "dense_over_library": medians["dense"] / medians["library"],
    }


def _plain(histogram: analysis.SimilarityHistogram) -> dict[str, Any]:
    counts = {name: values.tolist() for name, values in histogram._asdict().items()}
    return {**counts, "separation": histogram.separation()}
