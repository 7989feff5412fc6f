"""Switchable GRU and LSTM against torch's, sample by sample."""

import pytest
import torch
from torch import nn

from neuromod_ext.nn.switch import Dense, Switchable, co_optimise, layout


def switchable(kind: type[nn.Module], **options: object) -> Switchable:
    net = kind(3, 4, **options).double()
    at = layout(net)
    return Switchable(net, Dense.random(at.num_weights, 2), shift=torch.randn(at.num_biases))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"num_layers": 2},
        {"bidirectional": True, "batch_first": True, "num_layers": 2},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["states", "doses", "one"])
def test_each_sample_runs_with_its_own_weights(kind, options, given) -> None:
    switch = switchable(kind, **options)
    batch = 0 if switch.module.batch_first else 1
    x = torch.randn((5, 6, 3) if batch == 0 else (6, 5, 3)).double()
    state = {"states": torch.tensor([0, 1, 1, 0, 1]), "doses": torch.rand(5), "one": 0.3}[given]
    out, end = switch(x, state)
    ends = end if isinstance(end, tuple) else (end,)
    for i in range(5):
        one = state if given == "one" else state[i]
        want, last = switch.fold(one)(x.narrow(batch, i, 1))
        torch.testing.assert_close(out.narrow(batch, i, 1), want)
        for got, expected in zip(ends, last if isinstance(last, tuple) else (last,), strict=True):
            torch.testing.assert_close(got[:, i : i + 1], expected)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_given_first_state_and_gradients(kind) -> None:
    switch, x = switchable(kind, batch_first=True), torch.randn(2, 3, 3).double()
    first = torch.randn(1, 2, 4).double()
    hx = (first, first.flip(0)) if kind is nn.LSTM else first
    d = torch.tensor([0.2, 0.9]).double()
    want = switch.fold(d[1])(x[1:], (first[:, 1:],) * 2 if kind is nn.LSTM else first[:, 1:])[0]
    torch.testing.assert_close(switch(x, d, hx)[0][1:], want)
    assert torch.autograd.gradcheck(lambda d: switch(x, d)[0], (d.requires_grad_(),))
    weights = list(switch.parameters())
    grads = torch.autograd.grad(switch(x, d)[0].square().sum(), weights)
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_in_place_and_in_training(kind) -> None:
    switch, x = switchable(kind, batch_first=True), torch.randn(4, 5, 3).double()
    want = switch(x, 1)[0]
    with switch.switched():
        torch.testing.assert_close(switch(x)[0], want)

    def task(sign: int):
        return lambda network: [(network(x)[0].mean((1, 2)) - 0.3 * sign).square().mean()]

    optimizer = torch.optim.Adam(switch.parameters(), lr=0.02)
    losses: list[float] = []
    co_optimise(
        switch,
        [task(1), task(-1)],
        optimizer,
        period=1,
        cycles=60,
        scheme="joint",
        callback=lambda epoch: losses.append(epoch.losses[0]),
    )
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_compile(kind) -> None:
    """As torch's own recurrent layers: refused loudly, unless torch is told to try."""
    switch, x = switchable(kind, batch_first=True), torch.randn(4, 3, 3).double()
    d = torch.rand(4)
    run = torch.compile(switch, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        run(x, d)
    with torch._dynamo.config.patch(allow_rnn=True):
        torch.testing.assert_close(run(x, d)[0], switch(x, d)[0])


def test_refusals() -> None:
    switch = switchable(nn.LSTM)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 3).double(), [3, 2])
    assert switch(packed)[0].data.shape == (5, 4)
    for x in (packed, torch.randn(3, 3).double()):
        with pytest.raises(NotImplementedError, match="TiedLSTM: expected a batch of sequences"):
            switch(x, 1)
    with pytest.raises(NotImplementedError, match="no proj_size"):
        switchable(nn.LSTM, proj_size=2)(torch.randn(3, 2, 3).double(), 1)
