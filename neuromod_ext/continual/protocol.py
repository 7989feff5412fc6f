"""Learning tasks one after another, and testing all learned ones after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext.continual.streams import Task

Model = Callable[[Tensor], Tensor]


def fit(
    model: Model,
    task: Task,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
    after_epoch: Callable[[float], object] | None = None,
) -> list[float]:
    """Minimise the cross-entropy at a task.

    Args:
        model: Called with inputs, [B, C, H, W]; returns logits, [B, classes].
        task: What to learn.
        optimizer: Of the parameters to learn.
        epochs: Passes over the task, each in a new order.
        batch_size: At most so many inputs in a step.
        generator: Of the orders, on the CPU.
        after_epoch: Called after each epoch with the mean loss in it, to show progress or stop by
            an exception.

    Returns:
        The mean loss in each epoch.

    Raises:
        ValueError: ``epochs`` or ``batch_size`` below 1.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"fit: expected {name} of at least 1, got {value}")
    losses = []
    for _ in range(epochs):
        total = 0.0
        for places in torch.randperm(len(task), generator=generator).split(batch_size):
            inputs, labels = task[places]
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(places)
        losses.append(total / len(task))
        if after_epoch is not None:
            after_epoch(losses[-1])
    return losses


@torch.no_grad()
def accuracy(model: Model, task: Task, *, batch_size: int = 1000) -> float:
    """Share of a task's inputs that a model puts in their class.

    Args:
        model: Called with inputs, [B, C, H, W]; returns logits, [B, classes].
        task: What to test.
        batch_size: Inputs at a time.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: The task has no input, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"accuracy: expected batch_size of at least 1, got {batch_size}")
    if len(task) == 0:
        raise ValueError(f"accuracy: expected inputs in task {task.name!r}, got none")
    parts = zip(task.inputs.split(batch_size), task.labels.split(batch_size), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(task)


def learn_stream(
    train: Sequence[Task],
    test: Sequence[Task],
    learn: Callable[[int, Task], object],
    predict: Callable[[int, Tensor], Tensor],
    *,
    first: int = 0,
) -> Iterator[list[float]]:
    """Learn the tasks of a stream one after another; after each, test all tasks learned so far.

    Args:
        train: The stream to learn.
        test: The same tasks, of other images.
        learn: Called with a task's number and its data.
        predict: Called with a task's number and inputs; returns their logits.
        first: The task to begin with; those before it are learned already.

    Yields:
        After each task its row of the accuracy matrix: accuracies at tasks 0 to this one, 0 to 1;
        :func:`neuromod_ext.continual.accuracy_matrix` makes the matrix of them.

    Raises:
        ValueError: The streams differ in length, or there is no task ``first``.
    """
    if len(train) != len(test):
        raise ValueError(
            f"learn_stream: expected as many tasks in test as in train, {len(train)}, "
            f"got {len(test)}"
        )
    if not 0 <= first <= len(train):
        raise ValueError(f"learn_stream: expected first from 0 to {len(train)}, got {first}")
    for task in range(first, len(train)):
        learn(task, train[task])
        yield [accuracy(partial(predict, seen), test[seen]) for seen in range(task + 1)]
