"""What learns a stream of tasks: the fly's network under contexts, and its baselines."""

from __future__ import annotations

import hashlib
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import neuromod_ext as nm
from benchmarks.papers.resume import Kept
from neuromod_ext import continual
from neuromod_ext.continual import Task, TaskStream

CLASSES = 10
SMALL = 2**26  # pixels
Advance = Callable[[int], None]


class Sizes(NamedTuple):
    """What the networks are made for."""

    inputs: int
    hidden: int  # of the fly's network
    tasks: int

    @property
    def mlp(self) -> int:
        """Hidden units with which an MLP has as many parameters as the fly learns in all tasks."""
        return max(1, round((self.tasks * (self.hidden + 1) - CLASSES) / (self.inputs + 11)))


class Learner(Protocol):
    """Learns tasks in their order; ``modules`` is all that it has learned."""

    modules: nn.Module

    def begin(self, task: int) -> None:
        """Make room for a task."""

    def parameters(self, task: int) -> Iterator[nn.Parameter]:
        """What a task may change."""

    def logits(self, task: int, inputs: Tensor) -> Tensor:
        """Of inputs, [B, C, H, W], that are known to be of a task: [B, 10]."""

    def end(self, task: int) -> None:
        """Freeze what is done with."""


class Modulated:
    """One network of fixed random weights, and a context for each task."""

    def __init__(self, net: nm.nn.FlyNet | nm.nn.NeuroModNet) -> None:
        self.modules = self.net = net

    def begin(self, task: int) -> None:
        """Draw a context."""
        self.net.add_task()

    def parameters(self, task: int) -> Iterator[nn.Parameter]:
        """The context and its strength."""
        return self.net.task_parameters(task)

    def logits(self, task: int, inputs: Tensor) -> Tensor:
        """Under the context of the task."""
        return self.net(inputs, task)

    def end(self, task: int) -> None:
        """Freeze the context."""
        self.net.freeze_task(task)


class Fly(Modulated):
    """The fly's network, and what can be asked of it."""

    net: nm.nn.FlyNet

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__(nm.nn.FlyNet(sizes.inputs, sizes.hidden, CLASSES, seed=seed))

    def hidden(self, inputs: Tensor) -> Tensor:
        """What all contexts modulate: h, [B, H], of inputs, [B, C, H, W]."""
        return self.net.hash(inputs.flatten(1))

    def gains(self) -> Tensor:
        """The contexts of all tasks so far: α_t v_t, [T, H]."""
        return self.net.modulation.context_vectors()

    @property
    def index(self) -> Tensor:
        """The inputs of each hidden unit, [H, 7]."""
        return self.net.hash.index.long()

    @property
    def readout(self) -> Tensor:
        """R, [10, H]."""
        return self.net.readout.weight


class Shared:
    """One network, which learns each task over the last."""

    def __init__(self, net: nn.Module) -> None:
        self.modules = net

    def begin(self, task: int) -> None:
        """Nothing is new."""

    def parameters(self, task: int) -> Iterator[nn.Parameter]:
        """All."""
        return self.modules.parameters()

    def logits(self, task: int, inputs: Tensor) -> Tensor:
        """Whatever the task."""
        return self.modules(inputs)

    def end(self, task: int) -> None:
        """Nothing is frozen."""


class Separate:
    """A network for each task."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.build = build
        self.modules = nn.ModuleList()

    def begin(self, task: int) -> None:
        """Add a network."""
        self.modules.append(self.build())

    def parameters(self, task: int) -> Iterator[nn.Parameter]:
        """Those of the task's network."""
        return self.modules[task].parameters()

    def logits(self, task: int, inputs: Tensor) -> Tensor:
        """By the task's network."""
        return self.modules[task](inputs)

    def end(self, task: int) -> None:
        """Nothing else touches the network."""


def layers(sizes: Sizes, seed: int) -> Modulated:
    """Two hidden layers of fixed random weights, each modulated."""
    width = max(1, sizes.hidden // 8)
    net = nm.nn.NeuroModNet.dense((sizes.inputs, width, width, CLASSES), seed=seed)
    return Modulated(net)


def mlp(sizes: Sizes) -> nn.Module:
    """A network with one hidden layer."""
    width = sizes.mlp
    return nn.Sequential(
        nn.Flatten(), nn.Linear(sizes.inputs, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def linear(sizes: Sizes) -> nn.Module:
    """Softmax regression: within a few as many parameters as a context of the paper's sizes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(sizes.inputs, CLASSES))


class Repetition(NamedTuple):
    """A stream to be learned, with seeds of its own."""

    part: str  # its name among all
    train: TaskStream
    test: TaskStream
    sizes: Sizes
    number: int

    def seed(self, task: int) -> int:
        """Of all that is random in learning a task."""
        return 1000 * self.number + task

    def learner(self, name: str) -> Learner:
        """A learner that knows no task yet."""
        torch.manual_seed(self.number)
        return MODELS[name].build(self.sizes, self.number)

    def begin(self, learner: Learner, task: int) -> None:
        """Make room for a task, as always."""
        torch.manual_seed(self.seed(task))
        learner.begin(task)

    def untrained(self) -> Fly:
        """The fly's network with the contexts as they are before training."""
        fly = Fly(self.sizes, self.number)
        for task in range(len(self.train)):
            self.begin(fly, task)
        return fly


class Model(NamedTuple):
    """How a learner is made and trained."""

    build: Callable[[Sizes, int], Learner]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float


# RMSprop at 0.01 is the paper's for the fly; the baselines and Adam at 0.001 are our choice.
MODELS = {
    "fly": Model(Fly, torch.optim.RMSprop, 0.01),
    "layers": Model(layers, torch.optim.RMSprop, 0.01),
    "sequential": Model(lambda sizes, _: Shared(mlp(sizes)), torch.optim.Adam, 0.001),
    "separate": Model(lambda sizes, _: Separate(lambda: mlp(sizes)), torch.optim.Adam, 0.001),
    "linear": Model(lambda sizes, _: Separate(lambda: linear(sizes)), torch.optim.Adam, 0.001),
}
DESCRIPTIONS = {
    "fly": "the fly's network, a context for each task",
    "layers": "two dense random layers, contexts for each",
    "sequential": "an MLP that learns task after task",
    "separate": "an MLP for each task",
    "linear": "softmax regression for each task",
}


def learn(
    name: str, repetition: Repetition, options: dict[str, int], kept: Kept, advance: Advance
) -> tuple[Learner, dict[str, Any]]:
    """Learn a stream, from where an earlier run was interrupted on.

    All that is random in a task comes from a seed of its own: it is the same after an interruption.

    Args:
        name: Of the model.
        repetition: What it learns.
        options: Of :func:`neuromod_ext.continual.fit`.
        kept: What is done already, and where it is kept.
        advance: Called with the number of epochs that are done.

    Returns:
        What has learned, and by task in order: ``rows`` of the accuracy matrix, 0 to 1;
        ``changed``, the number of earlier tasks of which a logit is not, to the bit, what it was
        when they were learned; ``seconds`` of training.
    """
    model, learner = MODELS[name], repetition.learner(name)
    part = f"{repetition.part}-{name}"
    state = kept.load(part) or {"rows": [], "changed": [], "digests": [], "seconds": []}
    done = len(state["rows"])
    for task in range(done):
        learner.begin(task)
        learner.end(task)
    if done:
        learner.modules.load_state_dict(state["learned"])
        advance(done * options["epochs"])
    now: dict[int, Any] = {}

    def learn_task(task: int, data: Task) -> None:
        start = time.perf_counter()
        repetition.begin(learner, task)
        optimizer = model.optimizer(learner.parameters(task), lr=model.lr)
        order = torch.Generator().manual_seed(repetition.seed(task))
        logits = partial(learner.logits, task)
        continual.fit(
            logits, data, optimizer, generator=order, after_epoch=lambda _: advance(1), **options
        )
        learner.end(task)
        state["seconds"].append(time.perf_counter() - start)
        now.clear()

    def predict(task: int, inputs: Tensor) -> Tensor:
        logits = learner.logits(task, inputs)
        now.setdefault(task, hashlib.sha256()).update(logits.numpy().tobytes())
        return logits

    test: Sequence[Task] = repetition.test
    if len(test) * repetition.test.images.numel() < SMALL:
        test = list(test)  # rather than to make each task anew after every other
    rows = continual.learn_stream(repetition.train, test, learn_task, predict, first=done)
    for row in rows:
        found = [now[task].hexdigest() for task in range(len(row))]
        state["rows"].append(row)
        state["changed"].append(sum(map(operator.ne, state["digests"], found)))
        state["digests"].append(found[-1])
        kept.save(part, {**state, "learned": learner.modules.state_dict()})
    return learner, state
