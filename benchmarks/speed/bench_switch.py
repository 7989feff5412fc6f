"""nn.switch: a network's weights switched in place, and batches whose samples are in two states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.speed import peers
from benchmarks.speed.correctness import Expected, expect_by_autograd
from benchmarks.speed.limits import Work
from benchmarks.speed.problem import (
    BACKWARD,
    FORWARD,
    GOAL,
    Draw,
    Group,
    Problem,
    Result,
    Variant,
    both,
)
from neuromod_ext.nn.switch import Diagonal, Hadamard, Kronecker, Modulator, Switchable, layout

LAYERS, SIDES = 10, (32, 32)  # a layer of 1024 x 1024, and its factors: 10.5 million weights
WIDTHS = ((784, 512, 512, 10), (512, 512, 512), (1024, 1024, 1024, 1024))
SAMPLES = 256


def switch(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """Weights of a network, mapped in place: a rotation of all, and small factors of each layer."""
    if dtype != torch.float32:  # others are rounded, and no kernel is for them
        return
    layers, sides = (2, (4, 4)) if quick else (LAYERS, SIDES)
    side = sides[0] * sides[1]
    shape = {"L": layers, "O": side, "I": side}
    rotation = partial(rotated, layers, side)
    yield Group("switch", shape, dtype, {FORWARD: GOAL if quick else 2.0}, rotation, "Hadamard")
    factors = partial(multiplied, layers, sides)
    yield Group("switch", shape, dtype, {FORWARD: GOAL}, factors, "Kronecker")


def rotated(layers: int, side: int, device: torch.device) -> Problem:
    """All weights under one rotation."""
    operands = _weights(layers, side, device)
    modulator = Hadamard(layers * side**2, 0).to(device)
    others = [
        Variant("factors of 64", partial(peers.rotate_by_factors, modulator.signs)),
        Variant("butterflies", partial(peers.rotate_by_butterflies, modulator.signs)),
    ]
    total = sum(w.double().abs().sum() for w in operands.values())
    scale = 2 * total / len(modulator.signs) ** 0.5  # every weight enters with this share or less
    return _in_place(operands, modulator, others, scale, 60)


def multiplied(layers: int, sides: tuple[int, int], device: torch.device) -> Problem:
    """Each layer's weight W under A W Bᵀ, A and B products of two small rotations."""
    operands = _weights(layers, sides[0] * sides[1], device)
    # gains of 1: the numbers stay as large as they are, however often it is measured
    modulators = [
        Kronecker.random(*sides, *sides, seed=i, low=1.0, high=1.0).to(device)
        for i in range(layers)
    ]
    factors = [[getattr(m, f"factor_{i}").to(torch.float32) for i in range(4)] for m in modulators]
    full = [(torch.kron(a, b), torch.kron(c, d)) for a, b, c, d in factors]
    others = [
        Variant("einsum", partial(peers.map_by_einsum, factors)),
        Variant("full factors", partial(peers.map_by_full_factors, full)),
    ]
    whole = layout(_network((sides[0] * sides[1],) * (layers + 1), bias=False)).per_layer(
        lambda path, shape: modulators[int(path.split(".")[0])]
    )
    most = max(float(w.abs().max()) for w in operands.values())
    scale = torch.tensor(most * sides[0] * sides[1], dtype=torch.float64, device=device)
    return _in_place(operands, whole, others, scale, 4 * max(sides))


def _weights(layers: int, side: int, device: torch.device) -> dict[str, Tensor]:
    draw = Draw(torch.float32, device)
    return {f"w{i}": draw.normal(side, side) for i in range(layers)}


def _in_place(
    operands: dict[str, Tensor],
    modulator: Modulator,
    others: list[Variant],
    scale: Tensor,
    terms: int,
) -> Problem:
    def ours(**weights: Tensor) -> Result:
        modulator.overwrite(list(weights.values()))
        return ()

    def expected() -> dict[str, Expected]:
        flat = modulator(torch.cat([w.double().flatten() for w in operands.values()]))
        parts = flat.view(len(operands), *operands["w0"].shape)
        return {
            name: Expected(part, scale.expand(part.shape), terms, {})
            for name, part in zip(operands, parts, strict=True)
        }

    count = sum(w.numel() for w in operands.values())
    return Problem(
        operands,
        [Variant("neuromod_ext", ours, "ours"), *others],
        expected,
        {FORWARD: Work(0, 8 * count)},
        updated=tuple(operands),
    )


def mixed_batch(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """Samples in two states: with weights mapped before, and in training."""
    if dtype != torch.float32:
        return
    for widths in ((6, 5, 3),) if quick else WIDTHS:
        shape = {"B": 9 if quick else SAMPLES, "I": widths[0], "H": widths[1], "O": widths[-1]}
        # Gains of neurons need one product for both states, rotations one for each.
        for kind in ("gains", "rotations") if quick or widths == WIDTHS[-1] else ("gains",):
            for frozen in (True, False):
                goals = {FORWARD: GOAL} if frozen else {BACKWARD: both()[BACKWARD]}
                build = partial(mixed, shape["B"], widths, kind, frozen)
                case = f"{len(widths) - 1} layers, {kind}, {'frozen' if frozen else 'training'}"
                yield Group("mixed_batch", shape, dtype, goals, build, case)


def mixed(
    samples: int, widths: tuple[int, ...], kind: str, frozen: bool, device: torch.device
) -> Problem:
    """Linear layers, which alone count; in state 1, neurons have gains or weights are rotated."""
    draw = Draw(torch.float32, device)
    net = _network(widths, bias=False).to(device)
    weights = [draw.normal(o, i) / i**0.5 for i, o in pairwise(widths)]
    names = [f"{i}.weight" for i in range(len(weights))]
    net.load_state_dict(dict(zip(names, weights, strict=True)))
    at = layout(net)
    blocks: dict[str, Modulator] = {
        s.path: Diagonal.per_neuron(s.shape, i) if kind == "gains" else Hadamard(w.numel(), i)
        for i, (s, w) in enumerate(zip(at.weights, weights, strict=True))
    }
    model = Switchable(net, at.per_layer(lambda path, shape: blocks[path])).to(device)
    state = (draw.turns(samples) < 0.5).long()
    operands = {"input": draw.normal(samples, widths[0]), "state": state}
    operands |= {f"w{i}": w for i, w in enumerate(weights)}
    work = 2 * samples * sum(w.numel() for w in weights)
    moved = 4 * (samples * sum(widths) + 2 * sum(w.numel() for w in weights))

    block = ExitStack()
    if frozen:
        block.enter_context(model.frozen())

    def ours(input: Tensor, state: Tensor, **given: Tensor) -> Result:
        if frozen:
            assert block  # which is open as long as there is this function
            return model(input, state)
        parameters = dict(zip((f"module.{n}" for n in names), given.values(), strict=True))
        return functional_call(model, parameters, (input, state))

    def switched(weights: Iterable[Tensor]) -> list[Tensor]:
        pairs = zip(weights, blocks.values(), strict=True)
        return [block(w.flatten()).view_as(w) for w, block in pairs]

    second = switched(weights)  # folded before, if frozen

    def peer(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(input: Tensor, state: Tensor, **given: Tensor) -> Tensor:
            ws = list(given.values())
            return run(input, state, ws, second if frozen else switched(ws))

        return call

    def definition(input: Tensor, **given: Tensor) -> Tensor:
        """Of the weights of state 0, then those of state 1, as the library rounds them."""
        out, of_both = input, list(given.values())
        for w, other in zip(of_both[: len(weights)], of_both[len(weights) :], strict=True):
            out = torch.where(state.bool()[:, None], out @ other.mT, out @ w.mT)
        return out

    def expected() -> dict[str, Expected]:
        """A gradient comes back from state 1 through Mᵀ, whose entries' sizes bound its error."""
        both_states = {f"w{i}": w for i, w in enumerate(weights)}
        both_states |= {f"m{i}": w for i, w in enumerate(second)}
        wanted = () if frozen else tuple(both_states)
        found = expect_by_autograd(
            definition,
            {"input": operands["input"], **both_states},
            grad_output,
            wanted,
            dict.fromkeys(("output", *wanted), terms),
        )
        for name, block in zip(gradients, blocks.values(), strict=not frozen):
            own, other = found[name], found.pop(f"m{name[1:]}")
            back = block.transpose(other.value.flatten()).view_as(own.value)
            reach = block.transpose(other.scale.flatten()).view_as(own.scale)
            if kind == "rotations":  # of n numbers: no entry of M is larger than 2 / √n
                reach = (2 * other.scale.sum() / other.scale.numel() ** 0.5).expand_as(own.scale)
            found[name] = replace(own, value=own.value + back, scale=own.scale + reach)
        return found

    gradients = () if frozen else tuple(f"w{i}" for i in range(len(weights)))
    grad_output = draw.normal(samples, widths[-1])
    terms = sum(widths) + samples
    return Problem(
        operands,
        [
            Variant("neuromod_ext", ours, "ours"),
            Variant("two passes", peer(peers.two_passes)),
            Variant("sorted by hand", peer(peers.sorted_passes)),
            Variant(
                "a weight a sample",
                peer(peers.weight_of_each),
                workspace=4 * samples * max(w.numel() for w in weights),
            ),
        ],
        expected,
        {FORWARD: Work(work, moved), BACKWARD: Work(3 * work, 3 * moved)},
        grad_output,
        gradients,
    )


def _network(widths: tuple[int, ...], bias: bool) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o, bias=bias) for i, o in pairwise(widths)))
