"""Switchable in place: there and back, drift, steps taken while switched."""

import pytest
import torch
from bounds import UNIT
from test_switchable import cnn, data, switchable
from torch import Tensor, nn

from benchmarks.speed.memory import peak_bytes
from neuromod_ext.nn.switch import (
    Dense,
    Hadamard,
    Kronecker,
    Modulator,
    Orthogonal,
    Switchable,
    layout,
)


def flat(switch: Switchable) -> Tensor:
    return torch.cat([p.detach().flatten() for p in switch.module.parameters()])


@pytest.mark.parametrize("kind", ["whole", "per layer"])
@pytest.mark.parametrize("keep", [False, True])
def test_switching_in_place_gives_the_same_network(kind: str, keep: bool) -> None:
    model, x = cnn().eval(), data()
    at = layout(model)
    m: Modulator = Hadamard(at.num_weights, 1)
    if kind == "per layer":
        m = at.per_layer(lambda path, shape: Kronecker.random(shape[0], shape[1:].numel(), seed=2))
    switch = Switchable(model, m, shift=torch.randn(at.num_biases), keep_original=keep)
    want, before = switch(x, 1), flat(switch)
    identities = [id(p) for p in switch.parameters()]
    switch.switch_()
    assert switch.state == 1
    torch.testing.assert_close(switch(x), want)
    switch.switch_back_()
    assert switch.state == 0
    torch.testing.assert_close(flat(switch), before)
    assert [id(p) for p in switch.parameters()] == identities


@pytest.mark.parametrize("trips", [1_000, pytest.param(10_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_drift_of_round_trips_is_bounded(dtype: torch.dtype, trips: int) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).to(dtype)
    switch = Switchable(model, Orthogonal.random(12, 0), shift=torch.randn(5))
    w, b = (
        torch.cat([p.detach().flatten() for p in switch.parameters() if (p.dim() > 1) == weights])
        for weights in (True, False)
    )
    for _ in range(trips):
        switch.switch_()
        switch.switch_back_()
    now, bias = (
        torch.cat([p.detach().flatten() for p in switch.parameters() if (p.dim() > 1) == weights])
        for weights in (True, False)
    )
    drift = float((now.double() - w.double()).norm() / w.double().norm())
    assert 0 < drift <= switch.modulators[0].round_trip_bound(dtype, trips)
    # b + v rounds by u (|b| + |v|), and so does taking v away; a second trip meets the same sums
    assert (bias - b).abs().max() <= 4 * UNIT[dtype] * (b.abs().max() + switch.shift.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeping_the_original_is_free_of_drift(dtype: torch.dtype) -> None:
    model = cnn(dtype)
    with torch.no_grad():
        model[5].weight[0, :2] = torch.tensor([-0.0, 0.0])
    n = layout(model).num_weights
    switch = Switchable(model, Hadamard(n, 3), shift=torch.randn(7), keep_original=True)
    before = [p.detach().clone() for p in switch.parameters()]
    for _ in range(1000 if dtype == torch.float32 else 20):
        switch.switch_()
        switch.switch_back_()
    for old, new in zip(before, switch.parameters(), strict=True):
        assert torch.equal(old, new)
        assert torch.equal(old.signbit(), new.signbit())


def test_steps_taken_while_switched_are_mapped_back_by_the_inverse() -> None:
    model = cnn()
    n = layout(model).num_weights
    results = []
    for keep in (False, True):
        switch = Switchable(model, Dense.random(n, 3), keep_original=keep)
        w = torch.cat(
            [switch.module.get_parameter(s.path).flatten() for s in switch.layout.weights]
        )
        switch.switch_()
        moved = torch.linspace(-1, 1, n, dtype=torch.float64)
        with torch.no_grad():
            for slot in switch.layout.weights:
                switch.module.get_parameter(slot.path).add_(
                    moved[slot.begin : slot.end].view(slot.shape)
                )
        switch.switch_back_()
        now = torch.cat(
            [switch.module.get_parameter(s.path).flatten() for s in switch.layout.weights]
        )
        torch.testing.assert_close(now - w, switch.modulators[0].inverse(moved))
        results.append(now)
    torch.testing.assert_close(*results)


def test_a_rotation_in_place_takes_no_memory_of_the_networks_size() -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    size = 4 * layout(model).num_weights
    switch = Switchable(model, Hadamard(size // 4, 0))

    def both() -> None:
        switch.switch_()
        switch.switch_back_()

    assert peak_bytes(both, torch.device("cpu")) < size // 4


def test_an_optimizer_steps_on_across_switches() -> None:
    switch, x = switchable(cnn(), keep_original=True), data()
    optimizer = torch.optim.Adam(switch.parameters(), lr=0.01)
    for _ in range(3):
        for state in (0, 1):
            if state:
                switch.switch_()
            before = flat(switch)
            optimizer.zero_grad()
            switch(x).square().mean().backward()
            optimizer.step()
            assert not torch.equal(flat(switch), before)
            if state:
                switch.switch_back_()
