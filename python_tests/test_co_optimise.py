"""co_optimise: Algorithm 1 as the paper writes it, and the joint scheme."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromod_ext.nn.switch import Dense, Orthogonal, Switchable, co_optimise, layout
from neuromod_ext.nn.switch.training import Epoch

X = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).double()
AND, OR = (torch.tensor(t).double().unsqueeze(1) for t in ([0, 0, 0, 1], [0, 1, 1, 1]))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid()).double()


def task(target: Tensor, batches: int = 1):
    def epoch(network):
        for x, y in zip(X.chunk(batches), target.chunk(batches), strict=True):
            yield F.mse_loss(network(x), y)

    return epoch


def switchable(make=Dense.random, **options: bool) -> Switchable:
    model = net()
    n = layout(model).num_weights
    return Switchable(model, make(n, 5), shift=torch.linspace(-1, 1, 5), **options)


def flat(model: nn.Module, weights: bool) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if (p.dim() > 1) == weights])


@pytest.mark.parametrize("keep", [False, True])
def test_algorithm_1_line_by_line(keep: bool) -> None:
    """The paper's loop, on vectors: train, w' = M w, b' = b + v, train, w = M⁻¹ w', b = b' − v."""
    switch = switchable(keep_original=keep)
    m, v, lr, period, cycles = switch.modulators[0].matrix, switch.shift[0], 0.2, 3, 4

    def run(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        h = F.linear(x, w[:8].view(4, 2), b[:4]).relu()
        return F.linear(h, w[8:].view(1, 4), b[4:]).sigmoid()

    w, b = flat(switch.module, True), flat(switch.module, False)
    losses = []
    for _ in range(cycles):
        for target in (AND, OR):
            if target is OR:
                w, b = m @ w, b + v
            for _ in range(period):
                w, b = w.requires_grad_(), b.requires_grad_()
                loss = F.mse_loss(run(w, b, X), target)
                losses.append(loss.item())
                grads = torch.autograd.grad(loss, (w, b))
                w, b = ((p - lr * g).detach() for p, g in zip((w, b), grads, strict=True))
            if target is OR:
                w, b = torch.linalg.solve(m, w), b - v
    seen: list[Epoch] = []
    optimizer = torch.optim.SGD(switch.parameters(), lr=lr)
    co_optimise(
        switch, [task(AND), task(OR)], optimizer, period=period, cycles=cycles, callback=seen.append
    )
    torch.testing.assert_close(flat(switch.module, True), w)
    torch.testing.assert_close(flat(switch.module, False), b)
    torch.testing.assert_close([e.losses[0] for e in seen], losses)
    assert [(e.cycle, e.state, e.epoch) for e in seen[:7]] == [
        *((0, 0, 0), (0, 0, 1), (0, 0, 2)),
        *((0, 1, 0), (0, 1, 1), (0, 1, 2)),
        (1, 0, 0),
    ]


def test_a_joint_epoch_is_a_step_on_the_sum_of_all_losses() -> None:
    switch, other = switchable(), switchable()
    for model in (switch, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        if model is switch:
            tasks = [task(AND), task(OR)]
            co_optimise(model, tasks, optimizer, period=2, cycles=2, scheme="joint")
            continue
        x, states = torch.cat((X, X)), torch.tensor([0] * 4 + [1] * 4)
        for _ in range(4):  # one batch of both states
            optimizer.zero_grad()
            (2 * F.mse_loss(model(x, states), torch.cat((AND, OR)))).backward()
            optimizer.step()
    for p, q in zip(switch.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_one_state_at_a_time_the_schemes_agree_for_orthogonal_modulators() -> None:
    """A period of state 1 alone, in place or through Mᵀ: the same path if M⁻¹ = Mᵀ."""
    for make, same in ((Orthogonal.random, True), (Dense.random, False)):
        paths = []
        for scheme in ("alternating", "joint"):
            switch = switchable(make)
            optimizer = torch.optim.SGD(switch.parameters(), lr=0.2)
            tasks = [lambda network: iter(()), task(OR)]
            if scheme == "joint":
                co_optimise(switch, tasks, optimizer, period=5, cycles=1, scheme="joint")
            else:
                co_optimise(switch, tasks, optimizer, period=5, cycles=1)
            paths.append(flat(switch.module, True))
        assert torch.allclose(*paths, rtol=1e-9, atol=1e-12) == same


def test_and_or_are_learned() -> None:
    for scheme in ("alternating", "joint"):
        switch = switchable(Orthogonal.random)
        optimizer = torch.optim.SGD(switch.parameters(), lr=2.0)
        tasks = [task(AND), task(OR)]
        co_optimise(switch, tasks, optimizer, period=10, cycles=100, scheme=scheme)
        assert torch.equal(switch(X, 0).round(), AND)
        assert torch.equal(switch(X, 1).round(), OR)


def test_batches_optimizers_for_each_state_and_an_early_end() -> None:
    switch = switchable()
    optimizers = [torch.optim.Adam(switch.parameters(), lr=lr) for lr in (0.1, 0.01)]
    seen: list[Epoch] = []

    def callback(epoch: Epoch) -> bool:
        seen.append(epoch)
        assert switch.state == epoch.state
        return len(seen) == 5

    tasks = [task(AND, 2), task(OR, 4)]
    co_optimise(switch, tasks, optimizers, period=2, cycles=9, callback=callback)
    assert [len(e.losses) for e in seen] == [2, 2, 4, 4, 2]
    assert switch.state == 0
    steps = [next(iter(o.state.values()))["step"].item() for o in optimizers]
    assert steps == [6, 8]


def test_an_error_or_an_end_while_switched_switches_back() -> None:
    def fails(network):
        raise KeyError

    switch = switchable()
    optimizer = torch.optim.SGD(switch.parameters(), lr=0.1)
    with pytest.raises(KeyError):
        co_optimise(switch, [task(AND), fails], optimizer, period=1, cycles=1)
    assert switch.state == 0
    stop = lambda epoch: epoch.state == 1
    co_optimise(switch, [task(AND), task(OR)], optimizer, period=2, cycles=9, callback=stop)
    assert switch.state == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": [task(AND)]}, "expected a task for each of 2 states"),
        ({"optimizer": []}, "got 2 tasks and 0 optimizers"),
        ({"period": 0}, "expected period and cycles of at least 1, got 0 and 1"),
        ({"cycles": -1}, "got 1 and -1"),
        ({"scheme": "both"}, "expected scheme 'alternating' or 'joint', got 'both'"),
        ({"scheme": "joint", "optimizer": 2}, "expected one optimizer for scheme 'joint'"),
    ],
)
def test_refusals(change, words) -> None:
    switch = switchable()
    one = torch.optim.SGD(switch.parameters(), lr=0.1)
    change = {**change, **({"optimizer": [one] * 2} if change.get("optimizer") == 2 else {})}
    given = {"tasks": [task(AND), task(OR)], "optimizer": one, "period": 1, "cycles": 1, **change}
    with pytest.raises(ValueError, match=f"co_optimise: .*{words}"):
        co_optimise(switch, **given)
    switch.switch_()
    with pytest.raises(RuntimeError, match="co_optimise: expected a model in state 0, got state 1"):
        co_optimise(switch, [task(AND), task(OR)], one, period=1, cycles=1)
