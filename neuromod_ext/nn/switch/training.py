"""Co-optimisation: one set of weights learns a task in each state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from neuromod_ext.nn.switch.switchable import Switchable

Network = Callable[..., Any]
Task = Callable[[Network], Iterable[Tensor]]


class Epoch(NamedTuple):
    """What a callback is told.

    Attributes:
        cycle: Number of the cycle, from 0.
        state: The state that was trained, and the parameters are in; None in a joint epoch.
        epoch: Number of the epoch in this period, from 0.
        losses: Those before each step; of a joint epoch, sums over the states.
    """

    cycle: int
    state: int | None
    epoch: int
    losses: list[float]


def co_optimise(
    model: Switchable,
    tasks: Sequence[Task],
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    period: int,
    cycles: int,
    scheme: Literal["alternating", "joint"] = "alternating",
    callback: Callable[[Epoch], bool | None] | None = None,
) -> None:
    r"""Train a switchable model for a task in each of its states.

    'alternating' is the paper's Algorithm 1. A cycle trains state 0 for ``period`` epochs, switches
    to state 1 in place, trains there for as many and switches back (likewise for each further
    state). A step of descent in state j so moves w by

    .. math:: \Delta w = -\eta\, M_j^{-1} g_j, \qquad \text{and for 'joint' by }
        \Delta w = -\eta \sum_j M_j^\top g_j,

    g_j being the gradient at w_j: a joint epoch adds up the losses of all states and steps once for
    all. A cycle of it has ``period`` epochs.

    Args:
        model: In state 0, as it is again at the end, also after an error.
        tasks: One for each state, from 0. Called with a network, to be called as the model is; it
            yields the losses of an epoch, and each loss is followed by a step before the next is
            asked for.
        optimizer: Of the model's parameters. One for all states carries its momentum through
            switches unmapped; a sequence has one for each state ('alternating' only).
        period: m, epochs between switches.
        cycles: n.
        scheme: Which.
        callback: Called after every epoch; True ends the training.

    Raises:
        ValueError: Not one task (or optimizer) for each state, numbers below 1, another scheme.
        RuntimeError: The model is switched.

    Source: Algorithm 1 of "Neuromodulator-inspired task switching using a fixed weight-space
    transformation".
    """
    states = len(model.modulators) + 1
    optimizers = [optimizer] * states if isinstance(optimizer, Optimizer) else list(optimizer)
    if len(tasks) != states or len(optimizers) != states:
        raise ValueError(
            f"co_optimise: expected a task for each of {states} states, and one optimizer or as "
            f"many, got {len(tasks)} tasks and {len(optimizers)} optimizers"
        )
    if period < 1 or cycles < 1:
        raise ValueError(
            f"co_optimise: expected period and cycles of at least 1, got {period} and {cycles}"
        )
    if scheme not in ("alternating", "joint"):
        raise ValueError(f"co_optimise: expected scheme 'alternating' or 'joint', got {scheme!r}")
    if scheme == "joint" and not isinstance(optimizer, Optimizer):
        raise ValueError("co_optimise: expected one optimizer for scheme 'joint', got a sequence")
    if model.state != 0:
        raise RuntimeError(
            f"co_optimise: expected a model in state 0, got state {model.state}; "
            "call switch_back_() first"
        )
    tell = callback or (lambda epoch: None)
    run = _alternate if scheme == "alternating" else _join
    for cycle in range(cycles):
        for epoch in run(model, tasks, optimizers, period, cycle):
            if tell(epoch):
                return


def _alternate(
    model: Switchable, tasks: Sequence[Task], optimizers: list[Optimizer], period: int, cycle: int
) -> Iterator[Epoch]:
    for state, (task, optimizer) in enumerate(zip(tasks, optimizers, strict=True)):
        if state:
            model.switch_(state)
        try:
            for epoch in range(period):
                losses = [_step(optimizer, loss) for loss in task(model)]
                yield Epoch(cycle, state, epoch, losses)
        finally:  # also where the caller stops
            if state:
                model.switch_back_()


def _join(
    model: Switchable, tasks: Sequence[Task], optimizers: list[Optimizer], period: int, cycle: int
) -> Iterator[Epoch]:
    networks = [partial(_in_state, model, state) for state in range(len(tasks))]
    for epoch in range(period):
        losses = []
        batches = [task(network) for task, network in zip(tasks, networks, strict=True)]
        for batch in zip_longest(*batches):  # a state that has no more batches rests
            total = torch.stack([loss for loss in batch if loss is not None]).sum()
            losses.append(_step(optimizers[0], total))
        yield Epoch(cycle, None, epoch, losses)


def _in_state(model: Switchable, state: int, input: Any, *args: Any, **kwargs: Any) -> Any:
    return model(input, state, *args, **kwargs)


def _step(optimizer: Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
