"""Switchable: mixed batches against switched copies, in-place switching, and what is refused."""

import copy
import io
import math

import pytest
import torch
from bounds import UNIT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuromod_ext as nm
from neuromod_ext.nn.switch import (
    Composition,
    Dense,
    Diagonal,
    Hadamard,
    Modulator,
    Orthogonal,
    Switchable,
    layout,
)


def cnn(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, bias=False),
        nn.Flatten(),
        nn.Linear(2 * 16, 3),
    ).to(dtype)


def data(n: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 1, 6, 6, dtype=dtype)


def switchable(model: nn.Module, *seeds: int, **options: bool) -> Switchable:
    """With a dense modulator and a shift for each seed."""
    at = layout(model)
    modulators = [Dense.random(at.num_weights, seed) for seed in seeds or (1,)]
    return Switchable(
        model, *modulators, shift=torch.randn(len(modulators), at.num_biases), **options
    )


# What a layout is


def test_the_layout_is_all_weights_and_all_biases() -> None:
    model = cnn()
    at = layout(model)
    assert [slot.path for slot in at.weights] == ["0.weight", "3.weight", "5.weight"]
    assert [slot.path for slot in at.biases] == ["0.bias", "5.bias"]
    assert (at.num_weights, at.num_biases) == (36 + 72 + 96, 4 + 3)
    assert [(slot.begin, slot.end) for slot in at.weights] == [(0, 36), (36, 108), (108, 204)]


def test_flattening_is_the_papers() -> None:
    """w' = M w over all layers at once, b' = b + v."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    m, v = Dense.random(9, 1), torch.randn(4).double()
    w = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    w, b = m.matrix @ w, torch.cat([model[0].bias, model[2].bias]) + v
    folded = Switchable(model, m, shift=v).fold(1)
    torch.testing.assert_close(folded[0].weight, w[:6].view(3, 2))
    torch.testing.assert_close(folded[2].weight, w[6:].view(1, 3))
    torch.testing.assert_close(folded[0].bias, b[:3])
    torch.testing.assert_close(folded[2].bias, b[3:])
    assert type(folded[0]) is nn.Linear


def test_one_modulator_for_each_layer() -> None:
    model = cnn()
    per_layer = layout(model).per_layer(lambda path, shape: Diagonal.per_neuron(shape, len(path)))
    folded = Switchable(model, per_layer).fold(1)
    for i in (0, 3, 5):
        gain = folded[i].weight / model[i].weight
        torch.testing.assert_close(
            gain.flatten(1), gain.flatten(1)[:, :1].expand(len(gain), gain[0].numel())
        )
    with pytest.raises(ValueError, match=r"expected a modulator of 36 weights for '0\.weight'"):
        layout(model).per_layer(lambda path, shape: Hadamard(4, 0))


def test_what_a_layout_refuses() -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="got one tied between '0' and '1'"):
        layout(tied)
    with pytest.raises(ValueError, match="got none"):
        layout(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"in float32 on cpu, got float64 on cpu in '1'"):
        layout(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))


# Mixed batches


@pytest.mark.parametrize("kind", ["states", "doses", "several states", "several doses"])
def test_a_mixed_batch_equals_a_loop_over_switched_copies(kind: str) -> None:
    model, x = cnn().eval(), data()
    several = kind.startswith("several")
    switch = switchable(model, 1, 2) if several else switchable(model)
    if kind.endswith("states"):
        given = torch.tensor([0, 1, 1, 0, 2, 1, 2]) % (3 if several else 2)
    elif several:
        given = torch.rand(7, 2).double() / 2
    else:
        given = torch.rand(7).double()
    got = switch(x, given)
    for i, one in enumerate(given):
        torch.testing.assert_close(got[i : i + 1], switch.fold(one)(x[i : i + 1]))
    assert torch.equal(switch(x), model(x))


def test_states_doses_numbers_and_booleans_mean_the_same() -> None:
    model, x = cnn().eval(), data()
    switch = switchable(model)
    want = switch.fold(1)(x)
    for one in (
        1,
        1.0,
        True,
        torch.tensor(1),
        torch.ones(7).long(),
        torch.ones(7),
        torch.ones(7) > 0,
    ):
        torch.testing.assert_close(switch(x, one), want)
    torch.testing.assert_close(switch(x, 0), model(x))


class Running:
    """Bounds of a network of linear layers and ReLUs, layer by layer.

    A layer's output misses that of exact arithmetic by what its kernel misses for its own operands
    (bounds.py: 4 u S + terms e S), by what a point's entries miss, δ, times |x|, and by what its
    input misses, times |W|; ReLU enlarges no error. M w is computed in float64 and stored with one
    rounding u; the folded weight (1 − d) w + d M w of a copy rounds three times.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.u, self.e = UNIT[dtype], 2.0**-24

    def layer(
        self, x: Tensor, missed: Tensor, points: Tensor, bias: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight, shift = torch.einsum("bk,koi->boi", c, points), c @ bias
        size = torch.einsum("bk,koi->boi", c, points.abs())
        reach = x.abs() + missed
        scale = torch.einsum("boi,bi->bo", size, reach) + c @ bias.abs()
        terms = points.shape[-1] + len(points) + 3
        own = (4 * self.u + terms * self.e + 4 * self.u) * scale
        y = torch.einsum("boi,bi->bo", weight, x) + shift
        return y, 1.01 * (own + torch.einsum("boi,bi->bo", size, missed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["states", "doses"])
@pytest.mark.parametrize("rows", [False, True])
def test_a_mixed_batch_is_within_derived_bounds(dtype: torch.dtype, kind: str, rows: bool) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype)
    at = layout(model)
    shift = torch.randn(at.num_biases).to(dtype)
    each = at.per_layer(lambda path, shape: Diagonal.per_neuron(shape, len(shape)))
    switch = Switchable(model, each if rows else Diagonal.random(at.num_weights, 1), shift=shift)
    x = torch.randn(64, 40).to(dtype)
    given = torch.randint(0, 2, (64,)) if kind == "states" else torch.rand(64)
    got = switch(x, given).double()
    copies = torch.cat([switch.fold(one)(x[i : i + 1]) for i, one in enumerate(given)]).double()
    c = switch.coefficients(given)[0].double()
    exact = copy.deepcopy(switch).double()
    running, y, missed = Running(dtype), x.double(), torch.zeros(64, 40).double()
    points = exact.points()
    for path in ("0", "2"):
        p, b = points[path]["weight"].detach(), points[path]["bias"].detach()
        y, missed = running.layer(y, missed, p, b, c)
        y = y.relu() if path == "0" else y
    assert ((got - y).abs() <= missed).all()
    assert ((copies - y).abs() <= missed).all()
    assert ((got - copies).abs() <= 2 * missed).all()
    wrong = switch(x, 1 - given).double()
    assert ((wrong - y).abs() > missed).any()


def test_gradients_of_a_mixed_batch_come_back_through_the_transpose() -> None:
    model, x = cnn().eval(), data()
    switch, given = switchable(model), torch.tensor([0, 1, 1, 0, 1, 1, 0])
    switch(x, given).square().sum().backward()
    got = torch.cat(
        [switch.module.get_parameter(s.path).grad.flatten() for s in switch.layout.weights]
    )
    want = torch.zeros_like(got)
    for state in (0, 1):
        net = switch.fold(state)
        net(x[given == state]).square().sum().backward()
        g = torch.cat([net.get_parameter(s.path).grad.flatten() for s in switch.layout.weights])
        want += g if state == 0 else switch.modulators[0].transpose(g)
    torch.testing.assert_close(got, want)


def test_a_dose_has_a_gradient() -> None:
    switch, x = switchable(cnn().eval()), data()
    assert torch.autograd.gradcheck(
        lambda d: switch(x, d), (torch.rand(7).double().requires_grad_(),)
    )


@pytest.mark.parametrize("make", [lambda n: Dense.random(n, 3), lambda n: Orthogonal.random(n, 3)])
def test_the_two_schemes_agree_for_orthogonal_modulators_only(make) -> None:
    """In place a step moves w by −η M⁻¹ g', through the derivative by −η Mᵀ g'."""
    model, x = cnn().eval(), data()
    m: Modulator = make(layout(model).num_weights)
    steps = []
    for in_place in (True, False):
        switch = Switchable(model, m)
        before = torch.cat([p.detach().flatten().clone() for p in switch.parameters()])
        optimizer = torch.optim.SGD(switch.parameters(), lr=0.01)
        if in_place:
            with switch.switched():
                switch(x).square().sum().backward()
                optimizer.step()
        else:
            switch(x, 1).square().sum().backward()
            optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in switch.parameters()]) - before)
    if isinstance(m, Orthogonal):
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-6, atol=1e-12)
    else:
        assert float((steps[0] - steps[1]).norm()) > 0.1 * float(steps[1].norm())


# Copies, saved states, conversions, transforms


def test_saving_and_loading() -> None:
    switch, other, x = switchable(cnn().eval()), switchable(cnn().eval(), 9), data()
    other.load_state_dict(switch.state_dict())
    for state in (0, 1, 0.5):
        assert torch.equal(other(x, state), switch(x, state))
    assert set(switch.module.state_dict()) == set(cnn().state_dict())


@pytest.mark.parametrize("of", [lambda s: s, lambda s: s.module, lambda s: s.module[5]])
def test_saving_or_loading_while_switched_is_refused(of) -> None:
    switch = switchable(cnn())
    state = of(switch).state_dict()
    with switch.switched():
        for call, doing in (
            (of(switch).state_dict, "saving"),
            (lambda: of(switch).load_state_dict(state), "loading"),
        ):
            with pytest.raises(
                RuntimeError, match=f"expected weights in state 0 for {doing}, got state 1"
            ):
                call()
    of(switch).load_state_dict(of(switch).state_dict())


@pytest.mark.parametrize("keep", [False, True])
def test_copies_know_their_state(keep: bool) -> None:
    switch, x = switchable(cnn().eval(), keep_original=keep), data()
    want = switch(x, 0)
    switch.switch_()
    file = io.BytesIO()
    torch.save(switch, file)
    file.seek(0)
    for other in (copy.deepcopy(switch), torch.load(file, weights_only=False)):
        assert other.state == 1
        assert torch.equal(other(x), switch(x))
        other.switch_back_()
        torch.testing.assert_close(other(x), want)
    assert switch.state == 1


def test_the_model_given_is_not_changed() -> None:
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    switch = switchable(model)
    switch.switch_()
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_conversions() -> None:
    model, x = cnn(torch.float32).eval(), data(dtype=torch.float32)
    at = layout(model)
    switch = Switchable(model, Orthogonal.random(at.num_weights, 1), shift=torch.randn(7))
    wide = copy.deepcopy(switch).double()
    torch.testing.assert_close(wide(x.double(), 1), switch(x, 1).double(), rtol=1e-4, atol=1e-4)
    assert switch.modulators[0].matrix.dtype == torch.float64
    kept = switchable(cnn(), keep_original=True)
    kept.switch_()
    with pytest.raises(RuntimeError, match="expected parameters in state 0 for a conversion"):
        kept.float()
    ill = Switchable(model, Diagonal(torch.linspace(1, 100, at.num_weights)))
    with pytest.raises(ValueError, match="for weights of bfloat16, got 1e"):
        ill.bfloat16()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["states", "doses", "one"])
def test_compile(kind: str, dynamic: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    switch = switchable(model)
    run = torch.compile(switch, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (5, 7):
        x = torch.randn(n, 6).double()
        given = {"states": torch.randint(0, 2, (n,)), "doses": torch.rand(n), "one": 1}[kind]
        want = torch.autograd.grad(switch(x, given).square().sum(), list(switch.parameters()))
        got = torch.autograd.grad(run(x, given).square().sum(), list(switch.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert switch.module[0].ambient is None


def test_compiled_convolutions_and_a_state_in_place() -> None:
    switch, x, given = switchable(cnn().eval()), data(), torch.tensor([0, 1, 1, 0, 1, 0, 1])
    run = torch.compile(switch, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, given), switch(x, given))
    torch.testing.assert_close(run(x), switch(x))
    with switch.switched():
        torch.testing.assert_close(run(x), switch(x))


def test_out_of_the_domain_in_compiled_code_is_nan_for_that_sample() -> None:
    switch = switchable(nn.Linear(3, 2))
    run = torch.compile(switch, fullgraph=True, backend="aot_eager")
    for given in (torch.tensor([0.5, math.nan, 2.0, -1.0]), torch.tensor([1, 2, -1, 7])):
        out = run(torch.randn(4, 3), given)
        assert out[0].isfinite().all()
        assert out[1:].isnan().all()


def test_vmap_and_per_sample_gradients() -> None:
    switch = switchable(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double())
    x, d = torch.randn(5, 3).double(), torch.rand(5).double()
    parameters = dict(switch.named_parameters())

    def loss(parameters, x, d):
        return torch.func.functional_call(switch, parameters, (x[None], d[None])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, d)
    for i in range(5):
        g = torch.autograd.grad(
            switch(x[i : i + 1], d[i : i + 1]).square().sum(), list(parameters.values())
        )
        for name, want in zip(parameters, g, strict=True):
            torch.testing.assert_close(each[name][i], want)


def test_checkpointing_brings_the_states_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.context_fn = cnn().eval(), None

        def forward(self, x):
            if self.context_fn is None:
                return self.body(x)
            return checkpoint(self.body, x, use_reentrant=False, context_fn=self.context_fn)

    switch, x, d = switchable(Net()), data().requires_grad_(), torch.rand(7).double()
    (want,) = torch.autograd.grad(switch(x, d).square().sum(), x)
    switch.module.context_fn = switch.checkpoint_contexts
    (got,) = torch.autograd.grad(switch(x, d).square().sum(), x)
    torch.testing.assert_close(got, want)


# What else there is


def test_other_parameters_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    folded = switchable(model).fold(1)
    assert torch.equal(folded[1].weight, model[1].weight)
    assert not torch.equal(folded[2].weight, model[2].weight)
    assert nm.nn.switch.Switchable is Switchable


def test_points_by_layer_are_those_of_the_whole() -> None:
    model, x, given = cnn().eval(), data(), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    at = layout(model)
    modulators = [
        at.per_layer(lambda path, shape, s=s: Dense.random(shape.numel(), s)) for s in (1, 2)
    ]
    by_layer = Switchable(model, *modulators)
    whole = Switchable(model, *(Composition(m) for m in modulators))
    torch.testing.assert_close(by_layer.points(), whole.points())
    for switch in (by_layer, whole):
        switch(x, given).square().sum().backward()
    for p, q in zip(by_layer.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("padded", [False, True])
def test_fused_encoders_are_in_the_state_of_the_call(padded: bool) -> None:
    """In evaluation, torch's encoder reads the weights of plain layers without calling them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    switch = switchable(nn.TransformerEncoder(layer, 2).double()).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.tensor([5, 3, 4]).unsqueeze(1) <= torch.arange(5) if padded else None
    there = slice(None) if padding is None else ~padding
    with torch.no_grad():
        zero, one = (switch.fold(k).eval()(x, src_key_padding_mask=padding) for k in (0, 1))
        got = switch(x, torch.tensor([0, 1, 1]), src_key_padding_mask=padding)
    want = torch.cat((zero[:1], one[1:]))
    torch.testing.assert_close(got[there], want[there])
    assert not torch.allclose(zero[there], one[there])
    assert not any(module._forward_pre_hooks for module in switch.fold(1).modules())
