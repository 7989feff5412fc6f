"""The modules: torch.nn's arguments, initialisation, errors, and what torch does to a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

import neuromod_ext as nm
from neuromod_ext.nn import (
    ManifoldConv1d,
    ManifoldConv2d,
    ManifoldConv3d,
    ManifoldLayer,
    ManifoldLinear,
)

F64 = torch.float64
POINT = nm.Simplex(1)  # K = 1, c = 1
CONVS = {
    1: (ManifoldConv1d, nn.Conv1d),
    2: (ManifoldConv2d, nn.Conv2d),
    3: (ManifoldConv3d, nn.Conv3d),
}
ARGUMENTS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
]


def one(samples: int) -> torch.Tensor:
    return torch.ones(samples, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_of_one_basis_point(bias, dtype) -> None:
    torch.manual_seed(3)
    ours = ManifoldLinear(5, 4, bias, dtype=dtype, topology=POINT)
    torch.manual_seed(3)
    theirs = nn.Linear(5, 4, bias, dtype=dtype)
    assert torch.equal(ours.weight[0], theirs.weight)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = torch.randn(6, 5, dtype=dtype)
    torch.testing.assert_close(ours(x, one(6)), theirs(x))
    if bias:
        assert torch.equal(ours.bias[0], theirs.bias)
    else:
        assert ours.bias is None


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("dims", CONVS)
def test_conv_of_one_basis_point(dims, arguments) -> None:
    """The same random draws as torch.nn's, and then the same outputs and gradients."""
    manifold, plain = CONVS[dims]
    torch.manual_seed(3)
    ours = manifold(4, 6, 3, **arguments, dtype=F64, topology=POINT)
    torch.manual_seed(3)
    theirs = plain(4, 6, 3, **arguments, dtype=F64)
    assert torch.equal(ours.weight[0], theirs.weight)
    x = torch.randn(2, 4, *(7,) * dims, dtype=F64)
    out, want = ours(x, one(2).double()), theirs(x)
    torch.testing.assert_close(out, want)
    out.sin().sum().backward()
    want.sin().sum().backward()
    torch.testing.assert_close(ours.weight.grad[0], theirs.weight.grad)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("arguments", ARGUMENTS[2:], ids=str)
@pytest.mark.parametrize("dims", CONVS)
def test_conv_is_the_folded_conv_of_each_sample(dims, arguments) -> None:
    layer = CONVS[dims][0](4, 6, 3, **arguments, dtype=F64, topology=nm.Ellipse())
    x, s = torch.randn(3, 4, *(7,) * dims, dtype=F64), torch.rand(3, dtype=F64)
    want = [layer.fold(s[i])(x[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(layer(x, s), torch.cat(want))
    torch.testing.assert_close(layer(x, s[0]), layer.fold(s[0])(x))
    torch.testing.assert_close(layer(x[0], s[0]), layer.fold(s[0])(x[0]))


@pytest.mark.parametrize("topology", [nm.Line(), nm.Ellipse(), nm.Torus(), nm.Bezier(4)], ids=repr)
def test_initial_variance_is_the_plain_layers(topology) -> None:
    torch.manual_seed(0)
    layer = ManifoldLinear(64, 300, topology=topology, dtype=F64)
    nodes, weights = topology.quadrature()
    W = nm.functional.interpolate_weights(layer.weight, topology(nodes)).detach()
    variance = (W.square().mean((1, 2)) * weights).sum()
    plain = 1 / (3 * 64)  # uniform in ±1/sqrt(in_features)
    assert abs(variance / plain - 1) < 0.05
    b = nm.functional.interpolate_weights(layer.bias, topology(nodes)).detach()
    assert abs((b.square().mean(1) * weights).sum() / plain - 1) < 0.3


def test_reset_parameters_draws_each_basis_point_anew() -> None:
    layer = ManifoldLinear(5, 4, topology=nm.Line())
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    ManifoldLinear(0, 4, topology=nm.Line())  # an empty weight has no fan-in


# Conditions


def layers():
    return [
        (ManifoldLinear(3, 2, topology=nm.Line()), (3,)),
        (ManifoldConv1d(3, 2, 2, topology=nm.Line()), (3, 4)),
        (ManifoldConv2d(3, 2, 2, topology=nm.Line()), (3, 4, 4)),
        (ManifoldConv3d(3, 2, 2, topology=nm.Line()), (3, 3, 3, 3)),
    ]


@pytest.mark.parametrize("which", range(4))
def test_ways_to_give_a_condition(which) -> None:
    layer, shape = layers()[which]
    x, s = torch.randn(5, *shape), torch.rand(5)
    want = layer(x, s)
    torch.testing.assert_close(layer(x, coeff=nm.Line()(s)), want)
    torch.testing.assert_close(layer(x, coeff=nm.Line()(s).double()), want)  # converted
    torch.testing.assert_close(layer(x, s[:, None].squeeze(1).double()), want)
    single = layer(x, 0.25)
    torch.testing.assert_close(single, layer(x, torch.full((5,), 0.25)))
    torch.testing.assert_close(single, layer(x, torch.tensor(0.25)))
    torch.testing.assert_close(single, layer(x, torch.tensor([0.25])))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda f, x: f(x),
            ValueError,
            "expected a condition, got none; pass s or coeff, or call the model through "
            "neuromod_ext.Conditioned",
        ),
        (
            lambda f, x: f(x, 0.5, coeff=torch.ones(2)),
            ValueError,
            "expected either s or coeff, got both",
        ),
        (lambda f, x: f(x, 1.5), ValueError, "Line: expected s in [0, 1]"),
        (
            lambda f, x: f(x, torch.tensor([0.0, 0.5, -0.1, 0, 0])),
            ValueError,
            "got -0.10000000149011612 at index 2",
        ),
        (lambda f, x: f(x, float("nan")), ValueError, "Line: expected s in [0, 1]"),
        (
            lambda f, x: f(x, torch.rand(4)),
            ValueError,
            "expected coeff of shape [B, K] = [5, 2], got [4, 2]",
        ),
        (
            lambda f, x: f(x, torch.rand(5, 1)),
            ValueError,
            "expected coeff of shape [B, K], got [5, 1, 2]",
        ),
        (
            lambda f, x: f(x, coeff=torch.rand(5, 3)),
            ValueError,
            "expected coeff of shape [B, K] = [5, 2], got [5, 3]",
        ),
        (lambda f, x: f(x, torch.tensor(True)), TypeError, "expected s of a real dtype"),
        (lambda f, x: f(x.double(), 0.5), TypeError, "got float32; convert one of them"),
        (
            lambda f, x: f(x.long(), torch.rand(5)),
            TypeError,
            "expected input of dtype float64, float32, bfloat16 or float16, got int64",
        ),
        (lambda f, x: f(x[:, :2], torch.rand(5)), ValueError, "expected input of"),
    ],
)
@pytest.mark.parametrize("which", range(4))
def test_bad_calls(which, call, error, words) -> None:
    layer, shape = layers()[which]
    with pytest.raises(error) as caught:
        call(layer, torch.randn(5, *shape))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ManifoldLinear(3, 2), TypeError, "topology"),
        (
            lambda: ManifoldLinear(3, 2, topology="line"),
            TypeError,
            "ManifoldLinear: expected topology to be a Topology, got str",
        ),
        (
            lambda: ManifoldConv2d(3, 2, 2, topology=nm.Line),
            TypeError,
            "ManifoldConv2d: expected topology to be a Topology, got",
        ),
        (
            lambda: ManifoldConv2d(3, 2, 2, groups=2, topology=nm.Line()),
            ValueError,
            "in_channels must be divisible by groups",
        ),
        (
            lambda: ManifoldConv2d(2, 2, 2, padding="wide", topology=nm.Line()),
            ValueError,
            "Invalid padding string",
        ),
        (
            lambda: ManifoldConv2d(2, 2, 2, padding_mode="wrap", topology=nm.Line()),
            ValueError,
            "padding_mode must be one of",
        ),
        (lambda: ManifoldLayer(nm.Line()), TypeError, "abstract"),
    ],
)
def test_bad_construction(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_gradient_reaches_the_condition() -> None:
    layer = ManifoldLinear(3, 2, topology=nm.Bezier(2), dtype=F64)
    x, s = torch.randn(4, 3, dtype=F64), torch.rand(4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: layer(x, s), s)


def test_out_of_the_domain_in_compiled_code_is_nan_for_that_sample() -> None:
    layer = ManifoldLinear(3, 2, topology=nm.Line())
    x, s = torch.randn(3, 3), torch.tensor([0.5, 1.5, 0.25])
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, s)
    assert out.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(out[::2], layer(x[::2], s[::2]))


# What torch does to modules


def test_fold_and_from() -> None:
    for plain, manifold in (
        (nn.Linear(3, 2), ManifoldLinear.from_linear),
        (nn.Conv2d(3, 2, 2, bias=False), ManifoldConv2d.from_conv),
    ):
        plain.weight.requires_grad_(False)
        layer = manifold(plain.eval(), nm.Torus())
        folded = layer.fold(torch.tensor([0.1, 0.7]))
        assert type(folded) is type(plain)
        torch.testing.assert_close(folded.weight, plain.weight)
        assert not folded.training
        assert not layer.weight.requires_grad
        assert not folded.weight.requires_grad
        assert (folded.bias is None) == (plain.bias is None)
        assert repr(folded) == repr(plain)
        with pytest.raises(
            ValueError, match="fold: expected one condition, got 2; fold one at a time"
        ):
            layer.fold(torch.rand(2, 2))
        with pytest.raises(ValueError, match="expected a condition, got none"):
            layer.fold()


def test_from_linear_needs_a_constant_function() -> None:
    wave = nm.Custom(lambda s: torch.stack((s.sin(), s.cos()), -1), 2, domain=(0, 3))
    with pytest.raises(ValueError, match="expected the constant function in the span"):
        ManifoldLinear.from_linear(nn.Linear(2, 2), wave)


def test_extra_repr_names_the_topology() -> None:
    assert repr(ManifoldLinear(3, 2, False, topology=nm.Line())) == (
        "ManifoldLinear(in_features=3, out_features=2, bias=False, topology=Line())"
    )
    assert repr(ManifoldConv2d(2, 4, 3, groups=2, topology=nm.Ellipse())) == (
        "ManifoldConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), groups=2, topology=Ellipse())"
    )


@pytest.mark.parametrize("which", range(4))
def test_copies_and_state(which) -> None:
    layer, shape = layers()[which]
    x, s = torch.randn(5, *shape), torch.rand(5)
    want = layer(x, s)
    assert set(layer.state_dict()) == {"weight", "bias"}
    fresh = layers()[which][0]
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x, s), want)
        assert other.topology == layer.topology


def test_a_copy_of_a_parametrized_layer_knows_the_metric() -> None:
    layer = ManifoldLinear(3, 2, topology=nm.Line())
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    copied = copy.deepcopy(layer)
    assert type(copied).__name__ == "ParametrizedManifoldLinear"
    for old, new in zip(layer.parameters(), copied.parameters(), strict=True):
        assert new is not old
        assert torch.equal(new, old)
        assert new.manifold == old.manifold == nm.Line()
    x, s = torch.randn(5, 3), torch.rand(5)
    assert torch.equal(copied(x, s), layer(x, s))


def test_functional_call() -> None:
    layer = ManifoldLinear(3, 2, topology=nm.Line())
    x, s = torch.randn(5, 3), torch.rand(5)
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x, s)), 2 * layer(x, s))


def test_meta_device() -> None:
    layer = ManifoldConv2d(3, 2, 3, topology=nm.Ellipse(), device="meta")
    assert layer(torch.empty(5, 3, 8, 8, device="meta"), torch.empty(5, device="meta")).shape == (
        5,
        2,
        6,
        6,
    )
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(5, 3, 8, 8), torch.rand(5)).isfinite().all()


def test_parametrization_and_weight_decay_hooks_work_on_basis_points() -> None:
    layer = nn.utils.parametrizations.weight_norm(ManifoldLinear(3, 2, topology=nm.Line()))
    out = layer(torch.randn(5, 3), torch.rand(5))
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
