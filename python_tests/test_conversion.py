"""convert and fold: ordinary models to manifold models and back."""

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import nn

import neuromod_ext as nm
from neuromod_ext.nn import ManifoldConv2d, ManifoldLayer, ManifoldLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        tokens = x.flatten(2).mT
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.heads["a"](tokens) - self.heads["b"](tokens.mean(1, keepdim=True))


def data(n: int = 4):
    return torch.randn(n, 1, 4, 4), torch.rand(n)


def manifold_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, ManifoldLayer)}


CONVERTED = {"stem", "blocks.0.conv", "blocks.1.conv", "heads.a", "heads.b"}


@pytest.mark.parametrize("topology", [nm.Line(), nm.Ellipse(), nm.Torus(), nm.Spline(5)], ids=repr)
def test_pretrained_begins_with_the_models_own_weights(topology) -> None:
    plain = Net().eval()
    model = nm.convert(plain, topology, init="pretrained")
    x, s = data()[0], topology.sample(4)
    assert manifold_names(model.module) == CONVERTED
    torch.testing.assert_close(model(x, s), plain(x))


def test_scratch_draws_anew_and_leaves_the_model_alone() -> None:
    plain = Net()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    model = nm.convert(plain, nm.Line())
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert type(plain.stem) is nn.Conv2d
    W = model.module.stem.weight
    assert not torch.allclose(W[0], W[1])
    assert not torch.allclose(W[0], plain.stem.weight)
    assert torch.equal(model.module.blocks[0].norm.weight, plain.blocks[0].norm.weight)
    assert type(model.module.attention.out_proj) is type(plain.attention.out_proj)


def test_flags_are_kept() -> None:
    plain = Net().eval()
    plain.stem.weight.requires_grad_(False)
    for init in ("scratch", "pretrained"):
        module = nm.convert(plain, nm.Line(), init=init).module
        assert not any(m.training for m in module.modules())
        assert not module.stem.weight.requires_grad
        assert module.heads["a"].weight.requires_grad
    double = nm.convert(Net().double(), nm.Line()).module
    assert all(p.dtype == torch.float64 for p in double.parameters())


def test_include() -> None:
    seen = []

    def include(name, module):
        seen.append((name, type(module)))
        return name.startswith("heads")

    model = nm.convert(Net(), nm.Line(), include=include)
    assert manifold_names(model.module) == {"heads.a", "heads.b"}
    assert {name for name, _ in seen} == CONVERTED
    assert ("stem", nn.Conv2d) in seen


def test_a_layer_alone() -> None:
    layer = nn.Linear(3, 2)
    model = nm.convert(layer, nm.Ellipse(), init="pretrained")
    assert type(model.module) is ManifoldLinear
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x, torch.rand(5)), layer(x))
    folded = nm.fold(model.module, 0.2)
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), layer(x))


def test_subclasses_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nm.convert(nn.Sequential(Special(3, 3), nn.Linear(3, 2), nn.LazyLinear(2)), nm.Line())
    assert [type(m).__name__ for m in model.module] == ["Special", "ManifoldLinear", "LazyLinear"]


# fold


@pytest.mark.parametrize("s", [0.0, 0.37, torch.tensor(0.9), torch.tensor([0.5])])
def test_fold_is_the_model_at_one_condition(s) -> None:
    model = nm.convert(Net().eval(), nm.Line())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if isinstance(s, torch.Tensor) and s.dim():
        with pytest.raises(ValueError, match="expected one condition, got 1; fold one at a time"):
            nm.fold(model, s)
        return
    folded = nm.fold(model, s)
    assert not manifold_names(folded)
    assert type(folded) is Net
    x = data()[0]
    torch.testing.assert_close(folded(x), model(x, torch.full((4,), float(s))))
    torch.testing.assert_close(nm.fold(model, coeff=nm.Line()(s))(x), folded(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(folded.state_dict()) == set(Net().state_dict())


def test_fold_shares_no_memory_with_the_model() -> None:
    model = nm.convert(Net().eval(), nm.Line())
    x = data()[0]
    folded = nm.fold(model, 0.5)
    want = folded(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(folded(x), want)


# Sharing


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.inner = nn.Sequential(self.first, nn.Tanh(), self.first)

    def forward(self, x):
        return self.again(self.inner(self.first(x)))


def test_shared_modules_stay_shared() -> None:
    plain = Shared()
    model = nm.convert(plain, nm.Line(), init="pretrained")
    net = model.module
    assert net.first is net.again is net.inner[0] is net.inner[2]
    assert type(net.first) is ManifoldLinear
    assert len(list(model.parameters())) == 2
    x = torch.randn(4, 3)
    torch.testing.assert_close(model(x, torch.rand(4)), plain(x))
    folded = nm.fold(model, 0.5)
    assert folded.first is folded.again is folded.inner[2]
    assert type(folded.first) is nn.Linear


def test_tied_parameters_are_refused() -> None:
    tied = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(
        ValueError,
        match="convert: expected parameters of their own, got one tied between '0' and '1'",
    ):
        nm.convert(tied, nm.Line())
    both = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    both[1].bias = both[0].bias
    with pytest.raises(ValueError, match="tied between '0' and '1'; leave both out with include"):
        nm.convert(both, nm.Line())
    model = nm.convert(both, nm.Line(), include=lambda name, module: name == "2")
    assert model.module[0].bias is model.module[1].bias


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: nm.convert(nn.ReLU(), nm.Line()),
            ValueError,
            "convert: expected a model with a layer to convert, got none",
        ),
        (lambda: nm.convert(Net(), nm.Line(), include=lambda *a: False), ValueError, "got none"),
        (
            lambda: nm.convert(Net(), nm.Line(), init="random"),
            ValueError,
            "convert: expected init 'scratch' or 'pretrained', got 'random'",
        ),
        (
            lambda: nm.convert(Net(), "line"),
            TypeError,
            "convert: expected topology to be a Topology, got str",
        ),
        (
            lambda: nm.convert(Net(), nm.Custom(lambda s: s.unsqueeze(-1), 1), init="pretrained"),
            ValueError,
            "constant function",
        ),
        (
            lambda: nm.fold(Net(), 0.5),
            ValueError,
            "fold: expected a model with a manifold layer, got none",
        ),
        (
            lambda: nm.fold(nm.convert(Net(), nm.Line())),
            ValueError,
            "expected a condition, got none",
        ),
        (
            lambda: nm.fold(nm.convert(Net(), nm.Line()), 0.5, coeff=torch.ones(2)),
            ValueError,
            "expected either s or coeff, got both",
        ),
        (
            lambda: nm.fold(nm.convert(Net(), nm.Line()), torch.rand(3)),
            ValueError,
            "expected one condition, got 3",
        ),
        (
            lambda: nm.fold(nm.convert(Net(), nm.Line()), 1.5),
            ValueError,
            r"Line: expected s in \[0, 1\]",
        ),
        (
            lambda: nm.fold(nm.convert(Net(), nm.Line()), coeff=torch.ones(3)),
            ValueError,
            r"coeff of shape \[B, K\] = \[1, 2\], got \[1, 3\]",
        ),
    ],
)
def test_bad_calls(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_converted_model_trains() -> None:
    torch.manual_seed(0)
    model = nm.convert(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)), nm.Ellipse()
    )
    optimizer = nm.optim.ManifoldSGD(model.parameters(), lr=0.1, momentum=0.9)
    x, s = data(64)
    target = torch.cos(2 * torch.pi * s)[:, None]  # only the condition tells
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x, s) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_nested_in_a_conditioned_model() -> None:
    """A model that has manifold layers already keeps them; the others join."""
    net = nn.Sequential(ManifoldConv2d(1, 2, 3, topology=nm.Line()), nn.Flatten(), nn.Linear(8, 2))
    model = nm.convert(net, nm.Line(), init="pretrained")
    x, s = data()
    want = net[2](net[0](x, s).flatten(1))
    torch.testing.assert_close(model(x, s), want)


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("padded", [False, True])
def test_fused_encoders_call_their_layers(padded: bool) -> None:
    """In evaluation, torch's encoder reads the weights of plain layers without calling them."""
    model = nm.convert(encoder(), nm.Ellipse()).eval()
    x, s = torch.randn(3, 5, 8), torch.rand(3)
    padding = torch.tensor([5, 3, 4]).unsqueeze(1) <= torch.arange(5) if padded else None
    with torch.no_grad():
        got = model(x, s, src_key_padding_mask=padding)
        for b in range(3):
            plain = nm.fold(model, s[b]).eval()
            assert not any(module._forward_pre_hooks for module in plain.modules())
            mask = None if padding is None else padding[b : b + 1]
            want = plain(x[b : b + 1], src_key_padding_mask=mask)
            there = slice(None) if mask is None else ~mask[0]
            torch.testing.assert_close(got[b, there], want[0, there])


class Listed(nn.Module):
    """Calls its layers by a list that torch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.order = [self.a, self.b]

    def forward(self, x):
        return self.order[1](self.order[0](x))


WRAPPED = {
    "in a list": Listed,
    "compiled": lambda: nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager")),
    "shared": lambda: nn.Sequential(layer := nn.Linear(4, 4), layer),
}


@pytest.mark.parametrize("model", WRAPPED.values(), ids=WRAPPED)
def test_layers_are_converted_wherever_they_are_held(model) -> None:
    converted = nm.convert(model(), nm.Ellipse())
    x = torch.randn(3, 4)
    gradients = torch.autograd.grad(
        converted(x, torch.rand(3)).square().sum(), list(converted.parameters())
    )
    assert all(g.abs().sum() > 0 for g in gradients)
    assert not torch.allclose(converted(x, 0.1), converted(x, 0.4))
    torch.testing.assert_close(nm.fold(converted, 0.1)(x), converted(x, 0.1))


def test_hooks_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    net[0].register_forward_hook(lambda module, args, output: 10 * output)
    net[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.register_forward_hook(lambda module, args, output: output + 3)
    converted = nm.convert(net, nm.Ellipse(), init="pretrained")
    x = torch.randn(3, 4)
    torch.testing.assert_close(converted(x, 0.3), net(x))
    torch.testing.assert_close(nm.fold(converted, 0.3)(x), net(x))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_fold_takes_weights_as_the_layer_uses_them() -> None:
    layers = [ManifoldLinear(5, 4, topology=nm.Ellipse()) for _ in range(3)]
    nn.utils.parametrize.register_parametrization(layers[0], "weight", Half())
    nn.utils.prune.l1_unstructured(layers[1], "weight", 0.5)
    nn.utils.weight_norm(layers[2])
    x = torch.randn(3, 5)
    for layer in layers:
        with torch.no_grad():
            want = layer(x, 0.1)
            plain = nm.fold(layer, 0.1)
        assert type(plain) is nn.Linear
        assert list(plain.state_dict()) == ["weight", "bias"]
        torch.testing.assert_close(plain(x), want)


def test_scratch_needs_no_constant_function() -> None:
    wave = nm.Custom(lambda s: torch.stack((s.sin(), s.cos()), -1), 2)
    layer = nm.convert(nn.Linear(3, 2), wave).module
    assert layer(torch.randn(4, 3), torch.rand(4)).shape == (4, 2)
    with pytest.raises(ValueError, match="expected the constant function in the span"):
        nm.convert(nn.Linear(3, 2), wave, init="pretrained")


def test_two_topologies_in_one_model() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first = nm.convert(net, nm.Ellipse(), include=lambda name, module: name == "0")
    both = nm.convert(first, nm.Line(), include=lambda name, module: name == "1")
    assert [layer.topology for layer in both.module] == [nm.Ellipse(), nm.Line()]
    wrapped = nn.Sequential(both)
    x = torch.randn(3, 4)
    torch.testing.assert_close(nm.fold(wrapped, 0.2)(x), both(x, 0.2))


@pytest.mark.parametrize("make", [
    lambda net: nn.utils.prune.l1_unstructured(net, "weight", 0.5),
    nn.utils.spectral_norm,
    nn.utils.weight_norm,
])  # fmt: skip
def test_made_weights_are_refused(make) -> None:
    net = nn.Linear(3, 2)
    make(net)
    with pytest.raises(ValueError, match=r"convert: expected a weight that is a parameter in ''"):
        nm.convert(net, nm.Ellipse())
    with pytest.raises(ValueError, match=r"layout: expected weights that are parameters in ''"):
        nm.nn.switch.layout(net)
