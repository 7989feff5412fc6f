"""Many small networks that learn logic gates, all runs trained as one batched computation.

A run's weights are one row of a matrix, its biases one row of another, as the paper flattens them;
run r has a start and a modulator of its own. What one row does is what ``nn.switch.co_optimise``
does to one network; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch import Dense, Modulator, Orthogonal

Kind = Literal["dense", "orthogonal"]
INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
GATES = {
    name: torch.tensor(table, dtype=torch.float64)
    for name, table in {
        "AND": (0, 0, 0, 1),
        "OR": (0, 1, 1, 1),
        "XOR": (0, 1, 1, 0),
        "NOR": (1, 0, 0, 0),
    }.items()
}


class Sizes(NamedTuple):
    """A network of linear layers with ReLUs between and a sigmoid at the end."""

    units: tuple[int, ...]  # inputs, hidden, outputs

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the weights, [O, I] each."""
        return list(zip(self.units[1:], self.units, strict=False))

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(o * i for o, i in self.shapes)

    @property
    def biases(self) -> int:
        """Number of biases."""
        return sum(self.units[1:])


def two_layers(hidden: int) -> Sizes:
    """Two linear layers."""
    return Sizes((2, hidden, 1))


def four_layers(hidden: int) -> Sizes:
    """Four linear layers."""
    return Sizes((2, hidden, hidden, hidden, 1))


@dataclass
class Runs:
    """R networks.

    Attributes:
        sizes: Of each.
        w: Their weights, [R, n], float64.
        b: Their biases, [R, m].
    """

    sizes: Sizes
    w: Tensor
    b: Tensor

    @classmethod
    def start(cls, sizes: Sizes, runs: int, seed: int = 0) -> Runs:
        """Starts as of torch.nn.Linear: uniform within 1/√I of zero; run r is of seed + r."""
        rows = []
        for run in range(runs):
            stream = Seeded(seed + run, stream=1)
            parts = [(2 * stream.uniform(o * i) - 1) / math.sqrt(i) for o, i in sizes.shapes] + [
                (2 * stream.uniform(o) - 1) / math.sqrt(i) for o, i in sizes.shapes
            ]
            rows.append(torch.cat([torch.from_numpy(part) for part in parts]))
        w, b = torch.stack(rows).split([sizes.weights, sizes.biases], 1)
        return cls(sizes, w.contiguous(), b.contiguous())

    def parameters(self) -> Tensor:
        """All numbers of each run, [R, n + m]."""
        return torch.cat((self.w, self.b), 1)


@dataclass
class Switch:
    """A modulator and a shift for each run.

    Attributes:
        m: M, [R, n, n].
        inverse: M⁻¹.
        v: v, [R, m].
    """

    m: Tensor
    inverse: Tensor
    v: Tensor

    @classmethod
    def draw(cls, kind: Kind, sizes: Sizes, runs: int, seed: int = 0, shift: float = 1.0) -> Switch:
        """Of run r the library's modulator of seed + r, and a normal shift of that deviation."""
        draw = {"dense": Dense.random, "orthogonal": Orthogonal.random}[kind]
        modulators: list[Modulator] = [draw(sizes.weights, seed + run) for run in range(runs)]
        m = torch.stack([modulator.dense() for modulator in modulators])
        eye = torch.eye(sizes.weights, dtype=torch.float64)
        inverse = torch.stack([modulator.inverse(eye).T for modulator in modulators])
        normal = [Seeded(seed + run, stream=2).normal(sizes.biases) for run in range(runs)]
        v = shift * torch.stack([torch.from_numpy(row) for row in normal])
        return cls(m, inverse, v)

    def there(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """To w' = M w, b' = b + v."""
        return (self.m @ w.unsqueeze(-1)).squeeze(-1), b + self.v

    def back(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """To w = M⁻¹ w', b = b' − v."""
        return (self.inverse @ w.unsqueeze(-1)).squeeze(-1), b - self.v


def forward(sizes: Sizes, w: Tensor, b: Tensor) -> Tensor:
    """Outputs for all four inputs, [R, 4]."""
    x = INPUTS.expand(len(w), -1, -1)
    weights = w.split([o * i for o, i in sizes.shapes], 1)
    biases = b.split(list(sizes.units[1:]), 1)
    last = len(weights) - 1
    for layer, (weight, bias, shape) in enumerate(zip(weights, biases, sizes.shapes, strict=True)):
        x = torch.baddbmm(bias.unsqueeze(1), x, weight.view(-1, *shape).mT)
        x = x.sigmoid() if layer == last else x.relu()
    return x.squeeze(-1)


def loss(output: Tensor, gate: Tensor) -> Tensor:
    """Mean squared error of each run, [R]."""
    return (output - gate).square().mean(1)


def right(output: Tensor, gate: Tensor) -> Tensor:
    """Share of the four inputs at which each run gives the gate's output, [R]."""
    return ((output > 0.5) == (gate > 0.5)).double().mean(1)


def train(runs: Runs, gate: Tensor, epochs: int, lr: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradient descent in place; yields, before each step, losses and shares right, [R] each."""
    for _ in range(epochs):
        w, b = runs.w.requires_grad_(), runs.b.requires_grad_()
        output = forward(runs.sizes, w, b)
        losses = loss(output, gate)
        grads = torch.autograd.grad(losses.sum(), (w, b))  # runs do not meet
        runs.w, runs.b = w.detach() - lr * grads[0], b.detach() - lr * grads[1]
        yield losses.detach(), right(output.detach(), gate)


def train_jointly(
    runs: Runs, switch: Switch, gates: Sequence[Tensor], epochs: int, lr: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """The joint scheme: steps on the sum of both states' losses; yields [2, R] twice."""
    for _ in range(epochs):
        w, b = runs.w.requires_grad_(), runs.b.requires_grad_()
        outputs = forward(runs.sizes, w, b), forward(runs.sizes, *switch.there(w, b))
        losses = torch.stack([loss(o, gate) for o, gate in zip(outputs, gates, strict=True)])
        grads = torch.autograd.grad(losses.sum(), (w, b))
        runs.w, runs.b = w.detach() - lr * grads[0], b.detach() - lr * grads[1]
        shares = [right(o.detach(), gate) for o, gate in zip(outputs, gates, strict=True)]
        yield losses.detach(), torch.stack(shares)


class Cycle(NamedTuple):
    """What a cycle of co-optimisation showed.

    Attributes:
        losses: [2, period, R], of either state before each step.
        left: Shares right [2, R] of either state at the end of its own training.
        right: [2, R], at the end of the cycle, of both states of the same weights.
        parameters: [R, n + m], at the end.
        path: [T, n + m], of the first run after each step, where it was trained: w or w'.
    """

    losses: Tensor
    left: Tensor
    right: Tensor
    parameters: Tensor
    path: Tensor


def co_optimise(
    runs: Runs,
    switch: Switch,
    gates: Sequence[Tensor],
    *,
    period: int,
    cycles: int,
    lr: float,
    scheme: Literal["alternating", "joint"] = "alternating",
) -> Iterator[Cycle]:
    """As ``nn.switch.co_optimise``, of all runs at once, each with a modulator of its own."""
    for _ in range(cycles):
        left, path = [], []
        if scheme == "joint":
            seen = []
            for of_states, _ in train_jointly(runs, switch, gates, period, lr):
                seen.append(of_states)
                path.append(runs.parameters()[0])
            losses = torch.stack(seen, 1)
        else:
            periods = []
            for state, gate in enumerate(gates):
                if state:
                    runs.w, runs.b = switch.there(runs.w, runs.b)
                seen = []
                for of_state, _ in train(runs, gate, period, lr):
                    seen.append(of_state)
                    path.append(runs.parameters()[0])
                left.append(right(forward(runs.sizes, runs.w, runs.b), gate))
                periods.append(torch.stack(seen))
            runs.w, runs.b = switch.back(runs.w, runs.b)
            losses = torch.stack(periods)
        states = (runs.w, runs.b), switch.there(runs.w, runs.b)
        shares = [
            right(forward(runs.sizes, *state), gate)
            for state, gate in zip(states, gates, strict=True)
        ]
        both = torch.stack(shares)
        ended = torch.stack(left) if left else both
        yield Cycle(losses, ended, both, runs.parameters(), torch.stack(path))
