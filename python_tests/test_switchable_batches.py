"""Switchable: a batch in several states, and weights mapped once for many batches."""

import pytest
import torch
from test_switchable import cnn, data, switchable
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from neuromod_ext.nn.switch import Dense, Switchable, layout, tied
from neuromod_ext.nn.switch.layers import separable


@pytest.mark.parametrize("given", [[0, 1, 2, 1, 0, 2, 2], [2] * 7, [1, 0, 0, 0, 1, 1, 1]])
@pytest.mark.parametrize("looked_on", [False, True])
@pytest.mark.parametrize("model", ["linear", "tokens", "conv", "gru"])
def test_sorted_samples_yield_the_same(
    model: str, looked_on: bool, given: list[int], monkeypatch
) -> None:
    """Values, gradients and tangents, whether the model or each layer takes samples by state."""
    x: Tensor = torch.randn(7, 5, 6).double()
    net: nn.Module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    if model == "conv":
        net = nn.Sequential(nn.Conv1d(5, 4, 3, 2, 2, padding_mode="circular"), nn.Conv1d(4, 2, 2))
    elif model == "gru":
        net = nn.GRU(6, 4, batch_first=True)
    elif model == "linear":
        x = x[:, 0].clone()
    at = layout(net.double())
    modulators = [Dense.random(at.num_weights, seed) for seed in (1, 2)]
    shift = torch.randn(2, at.num_biases)
    switch = Switchable(net, *modulators, shift=shift)
    states, found = torch.tensor(given), []
    batches: list[int] = []
    if looked_on:
        switch.module.register_forward_hook(lambda net, inputs, out: batches.append(len(inputs[0])))
    for least in (10**9, 0):
        monkeypatch.setattr(tied, "WORTH_SORTING", least)
        inputs = [x.requires_grad_(), *switch.parameters()]
        y = switch(x, states)
        y = y[0] if model == "gru" else y
        grads = torch.autograd.grad(y.square().sum(), inputs)
        with forward_ad.dual_level():
            out = switch(forward_ad.make_dual(x.detach(), torch.ones_like(x)), states)
            tangent = forward_ad.unpack_dual(out[0] if model == "gru" else out).tangent
        found.append((y, tangent, *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert batches == [7] * 4 * looked_on


def test_which_models_take_samples_one_by_one() -> None:
    plain = switchable(cnn()).module
    assert separable(plain.eval())
    assert not separable(plain.train()), "batch normalisation"
    for last in (nn.Softmax(0), nn.GRU(3, 2), nn.Flatten(0)):
        assert not separable(nn.Sequential(plain.eval(), last))
    assert not separable(nn.Sequential(plain, nn.BatchNorm1d(3, track_running_stats=False).eval()))
    plain[2].register_forward_pre_hook(lambda net, inputs: None)
    assert not separable(plain)


def test_a_batch_is_normalised_as_a_whole(monkeypatch) -> None:
    """In training, statistics are of all samples, in any state."""
    monkeypatch.setattr(tied, "WORTH_SORTING", 0)
    switch, x = switchable(cnn()), data()
    found = [
        switch(x, torch.tensor([0, 1, 1, 0, 1, 0, 0]).to(kind))
        for kind in (torch.int64, torch.float64)
    ]
    torch.testing.assert_close(*found)
    norm = switch.module[1]
    assert norm.num_batches_tracked == 2


def test_frozen_weights_are_mapped_once() -> None:
    switch, x, states = switchable(cnn().eval()), data(), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    want, maps = switch(x, states), []
    switch.modulators[0].register_forward_hook(lambda *_: maps.append(1))
    with switch.frozen() as frozen:
        for _ in range(3):
            got = frozen(x, states)
        weights = [slot.of(switch.module) for slot in switch.layout.weights]
        assert torch.autograd.grad(got.sum(), weights, allow_unused=True) == (None,) * 3
        torch.testing.assert_close(got, want)
        assert len(maps) == 1
        others = {f"module.{s.path}": s.of(switch.module) + 1 for s in switch.layout.weights}
        changed = pytest.raises(RuntimeError, match="parameters that stay as they are while frozen")
        with changed:
            functional_call(switch, others, (x, states))
        with pytest.raises(RuntimeError, match="no conversion while frozen"):
            switch.float()
        with torch.no_grad():
            next(switch.parameters()).mul_(2)
        with changed:
            switch(x, states)
    torch.testing.assert_close(switch(x, states), switch(x, states.double()))
    assert len(maps) > 1


def test_frozen_notices_other_memory_and_another_shift() -> None:
    switch, x = switchable(nn.Linear(3, 2)), torch.randn(2, 3)
    for change in (
        lambda: setattr(switch.module.weight, "data", torch.randn(2, 3)),
        lambda: switch.shift.fill_(1.0),
    ):
        with switch.frozen():
            switch(x, 1)
            change()
            with pytest.raises(RuntimeError, match="got changed ones"):
                switch(x, 1)


def test_sorted_samples_of_a_model_that_returns_two_results() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.MaxPool1d(2, return_indices=True))
    switch = switchable(model)
    x, state = torch.randn(400, 1, 10), torch.randint(0, 2, (400,))
    for got, want in zip(switch(x, state), switch(x[:4], state[:4]), strict=True):
        torch.testing.assert_close(got[:4], want)
