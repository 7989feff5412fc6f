"""Switchable: modulators that give the rows of a weight a gain, and need no second weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

from neuromod_ext.nn.switch import (
    BlockDiagonal,
    Composition,
    Dense,
    Diagonal,
    Modulator,
    Switchable,
    layout,
    tied,
)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(5, 4, 3, 2), nn.Conv1d(4, 2, 2, groups=2)),
    "conv2d": lambda: nn.Sequential(
        nn.Unflatten(-1, (3, 2)), nn.Conv2d(5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    ),
    "gru": lambda: nn.GRU(6, 4, batch_first=True),
}


def per_neuron(model: nn.Module, seed: int, hidden: bool = False) -> BlockDiagonal:
    """A gain for each neuron; hidden, as modulators of which nothing else is known."""

    def build(path: str, shape: torch.Size) -> Modulator:
        gain = Diagonal.per_neuron(shape, seed + len(shape))
        return Composition(gain) if hidden else gain

    return layout(model).per_layer(build)


def both(model: nn.Module) -> list[Switchable]:
    """The model with gains, and the same that does not know what they are."""
    shift = torch.randn(2, layout(model).num_biases)
    return [
        Switchable(model, *(per_neuron(model, seed, hidden) for seed in (1, 2)), shift=shift)
        for hidden in (False, True)
    ]


def conditions(kind: str, samples: int) -> Tensor:
    if kind == "states":
        return torch.randint(0, 3, (samples,))
    if kind == "one state":
        return torch.tensor(2)
    return (torch.rand(2) if kind == "one dose" else torch.rand(samples, 2)).double() / 2


def called(switch: nn.Module, x: Tensor, given: Tensor) -> Tensor:
    out = switch(x, given)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", ["states", "doses", "one state", "one dose"])
@pytest.mark.parametrize("name", MODELS)
def test_gains_of_outputs_are_gains_of_rows(name: str, kind: str) -> None:
    """Values, gradients of first and second order, and tangents, as with a weight a state."""
    model, x = MODELS[name]().double(), torch.randn(7, 5, 6).double()
    given, found = conditions(kind, 7), []
    direction = torch.randn_like(x)
    for switch in both(model):
        leaves = [x.clone().requires_grad_(), *switch.parameters()]
        doses = given.clone().requires_grad_() if given.is_floating_point() else given
        leaves += [doses] * given.is_floating_point()
        y = called(switch, leaves[0], doses)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        with forward_ad.dual_level():
            dual = called(switch, forward_ad.make_dual(x, direction), given)
            tangents = [forward_ad.unpack_dual(dual).tangent]
            if given.is_floating_point():
                dual = called(switch, x, forward_ad.make_dual(given, torch.ones_like(given)))
                tangents.append(forward_ad.unpack_dual(dual).tangent)
        found.append([y, *first, *second, *tangents])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(found[0]) > 6 and all(t.abs().max() > 0 for t in found[0])


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_gains_under_transforms(name: str) -> None:
    """vmap over doses alone, over inputs, and a jvp with respect to doses."""
    model, x, d = (
        MODELS[name]().double(),
        torch.randn(7, 5, 6).double(),
        torch.rand(4, 2).double() / 2,
    )
    ours, theirs = both(model)
    for switched in (lambda s: vmap(lambda one: s(x, one))(d), lambda s: vmap(s)(x[:4], d)):
        torch.testing.assert_close(switched(ours), switched(theirs))
    direction = torch.ones(2).double()
    for got, want in zip(
        *(jvp(lambda one, s=s: s(x, one), (d[0],), (direction,)) for s in (ours, theirs)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_no_second_weight_is_made() -> None:
    """Frozen or not, no tensor as large as a weight appears, and samples are not sorted."""
    switch = Switchable(nn.Linear(300, 200), per_neuron(nn.Linear(300, 200), 1))
    x, states = torch.randn(3, 300), torch.tensor([0, 1, 0])
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.data_ptr() != switch.module.weight.data_ptr():
                sizes.append(out.numel())
            return out

    with Watch(), torch.no_grad():
        switch(x, states)
        with switch.frozen():
            switch(x, states)
    assert 600 <= max(sizes) < 300 * 200


@pytest.mark.parametrize("first", [0, 1])
def test_beside_a_layer_with_a_weight_a_state(first: int, monkeypatch) -> None:
    """One layer has gains, the other a dense modulator; states of whole samples are sorted."""
    monkeypatch.setattr(tied, "WORTH_SORTING", 0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    blocks = [Diagonal.per_neuron((6, 6), 1), Dense.random(36, 1)]
    at = layout(model)
    switch = Switchable(model, BlockDiagonal(*blocks[:: 1 - 2 * first]))
    assert at.num_weights == 72
    x, states = torch.randn(7, 6).double(), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    for each in (states, states.double(), torch.zeros_like(states), torch.ones_like(states)):
        want = torch.stack([switch.fold(s)(row) for s, row in zip(each, x, strict=True)])
        torch.testing.assert_close(switch(x, each), want)


def test_frozen_gains_follow_no_gradient() -> None:
    model = MODELS["linear"]()
    switch, x = both(model)[0], torch.randn(3, 6, requires_grad=True)
    with switch.frozen():
        out = switch(x, torch.tensor([0, 2, 1]))
        grads = torch.autograd.grad(out.sum(), [x, *switch.parameters()], allow_unused=True)
    assert grads[0] is not None and grads[1:] == (None,) * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_gained_outputs(dtype: torch.dtype) -> None:
    model = MODELS["linear"]()
    x, d = torch.randn(7, 6), torch.rand(7, 2) / 2
    ours, theirs = both(model)
    with torch.autocast("cpu", dtype):
        got, want = ours(x, d), theirs(x, d)
    assert got.dtype == want.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
    assert ours.to(dtype)(x.to(dtype), d).dtype == dtype


def test_gains_refuse_a_batch_of_another_size() -> None:
    """Nothing is broadcast over samples."""
    line = Switchable(nn.Linear(6, 4), per_neuron(nn.Linear(6, 4), 1))
    conv = Switchable(nn.Conv1d(5, 4, 3), per_neuron(nn.Conv1d(5, 4, 3), 1))
    message = "expected a batch of {} samples, one for each state or dose, got a layer's output"
    for switch, x, count in (
        (line, torch.randn(5, 6), 1),
        (line, torch.randn(1, 6), 5),
        (line, torch.randn(6), 4),
        (conv, torch.randn(5, 6), 4),
        (conv, torch.randn(1, 5, 6), 2),
    ):
        for given in (torch.zeros(count, dtype=torch.int64), torch.zeros(count)):
            with pytest.raises(ValueError, match=message.format(count)):
                switch(x, given)
    assert line(torch.randn(0, 6), torch.zeros(0)).shape == (0, 4)
    torch.testing.assert_close(conv(x[0], 1), conv.fold(1)(x[0]))


def test_gains_compile() -> None:
    switch = both(MODELS["linear"]().double())[0]
    x, d = torch.randn(7, 6).double(), torch.rand(7, 2).double() / 2
    compiled = torch.compile(switch, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, d), switch(x, d))
    states = torch.tensor([0, 2, 1, 1, 0, 2, 0])
    torch.testing.assert_close(compiled(x, states), switch(x, states))
    assert compiled(x, states + 1).isnan().any(1).tolist() == (states == 2).tolist()
    names = dict(switch.named_parameters())
    torch.testing.assert_close(functional_call(switch, names, (x, states)), switch(x, states))
