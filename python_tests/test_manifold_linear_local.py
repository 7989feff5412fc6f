"""manifold_linear_local beside manifold_linear, and the topologies on which few points act."""

import math

import pytest
import torch
from sampling import DTYPES, Draw, name_of
from test_manifold_linear_backward import Calls
from torch import Tensor

import neuromod_ext as nm
import neuromod_ext.functional as MF

CURVES = [
    nm.PiecewiseLinear(2),
    nm.PiecewiseLinear(5),
    nm.PiecewiseLinear(2, closed=True),
    nm.PiecewiseLinear(5, closed=True),
    nm.Spline(4),
    nm.Spline(9),
    nm.Spline(4, closed=True),
    nm.Spline(9, closed=True),
]
OTHERS = [nm.Line(), nm.Bezier(3), nm.Ellipse(), nm.Sphere(), nm.Discrete(3), nm.Cylinder()]
every_curve = pytest.mark.parametrize("topology", CURVES, ids=str)


def dense(index: Tensor, coeff: Tensor, num_basis: int) -> Tensor:
    """By a loop over samples and coefficients."""
    out = coeff.new_zeros(len(coeff), num_basis)
    for b, first in enumerate(index.tolist()):
        for l in range(coeff.shape[1]):
            out[b, (first + l) % num_basis] += coeff[b, l]
    return out


def conditions(topology: nm.Topology, dtype: torch.dtype) -> Tensor:
    """Knots, what lies beside them, and anything between; where closed, beyond one turn."""
    n = topology.num_basis
    knots = torch.arange(-2 * n, 3 * n + 1, dtype=dtype) / n
    beside = torch.cat((knots.nextafter(knots + 1), knots.nextafter(knots - 1)))
    s = torch.cat((knots, beside, torch.linspace(-2, 3, 97, dtype=dtype)))
    return s if topology.closed else s[(s >= 0) & (s <= 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_curve
def test_local_coefficients_scatter_to_the_dense_ones(topology, dtype: torch.dtype) -> None:
    s = conditions(topology, dtype)
    index, coeff = topology.local(s)
    assert (index.dtype, coeff.dtype) == (torch.int64, dtype)
    assert (index.shape, coeff.shape) == (s.shape, (*s.shape, topology.num_local))
    assert ((index >= 0) & (index < topology.num_basis)).all()
    assert topology.num_local == topology.degree + 1 <= topology.num_basis
    assert torch.equal(dense(index, coeff, topology.num_basis), topology(s))


@pytest.mark.parametrize("topology", OTHERS, ids=str)
def test_other_topologies_yield_all_coefficients(topology) -> None:
    s = topology.sample(7, generator=torch.Generator().manual_seed(0))
    index, coeff = topology.local(s)
    assert topology.num_local == topology.num_basis
    assert torch.equal(index, torch.zeros(7, dtype=torch.int64))
    assert torch.equal(coeff, topology(s))


@every_curve
def test_any_shape_of_conditions(topology) -> None:
    s = torch.rand(2, 3)
    index, coeff = topology.local(s)
    assert (index.shape, coeff.shape) == ((2, 3), (2, 3, topology.num_local))
    index, coeff = topology.local(0.3)
    assert (index.shape, coeff.shape) == ((), (topology.num_local,))
    assert torch.equal(dense(index[None], coeff[None], topology.num_basis)[0], topology(0.3))


@every_curve
def test_derivatives_are_those_of_the_dense_coefficients(topology) -> None:
    s = torch.rand(7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, topology.num_basis, dtype=torch.float64)

    def derivatives(c: Tensor) -> list[Tensor]:
        first = torch.autograd.grad((c.sin() * weight).sum(), s, create_graph=True)
        return [*first, *torch.autograd.grad(first[0].sum(), s)]

    index, coeff = topology.local(s)
    at = (index[:, None] + torch.arange(topology.num_local)) % topology.num_basis
    scattered = torch.zeros(7, topology.num_basis).double().scatter(1, at, coeff)
    for got, want in zip(derivatives(scattered), derivatives(topology(s)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0])
@every_curve
def test_out_of_the_domain(topology, bad: float) -> None:
    """An error where values can be read, and elsewhere NaN for exactly that condition."""
    if topology.closed and bad == 2.0:
        return
    s = torch.tensor([0.2, bad, 0.7])
    with pytest.raises(ValueError, match="expected s") as dense_error:
        topology(s)
    with pytest.raises(ValueError, match="expected s") as caught:
        topology.local(s)
    assert str(caught.value) == str(dense_error.value)
    index, coeff = torch.compile(topology.local, fullgraph=True, backend="eager")(s)
    assert coeff.isnan().any(1).tolist() == coeff.isnan().all(1).tolist() == [False, True, False]
    assert ((index >= 0) & (index < topology.num_basis)).all()


# The function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(), (3,), (2, 1, 2)])
def test_is_the_dense_function_of_scattered_coefficients(tokens, dtype: torch.dtype) -> None:
    """Index anywhere, of either sign; the same operands, results and gradients."""
    for K, L in ((1, 1), (5, 1), (5, 3), (4, 4)):
        d = Draw(f"dense/{tokens}/{name_of(dtype)}/{K}/{L}", dtype)
        index = d.index(9, modulus=K)
        leaves = [d.tensor(9, *tokens, 7), d.tensor(K, 6, 7), d.coeff(9, L), d.tensor(K, 6)]
        ours = [t.clone().requires_grad_() for t in leaves]
        theirs = [t.clone().requires_grad_() for t in leaves]
        out = MF.manifold_linear_local(ours[0], ours[1], index, ours[2], ours[3])
        at = torch.tensor([[(i + l) % K for l in range(L)] for i in index.tolist()])
        zeros = torch.zeros(9, K, dtype=leaves[2].dtype)
        coeff = zeros.scatter(1, at, theirs[2])
        assert torch.equal(coeff, dense(index, leaves[2], K))
        want = MF.manifold_linear(theirs[0], theirs[1], coeff, theirs[3])
        g = d.tensor(*want.shape)
        out.backward(g)
        want.backward(g)
        close = (
            {} if dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.2}
        )  # test_oracle.py bounds it
        torch.testing.assert_close(out, want, **close)
        for t, u in zip(ours, theirs, strict=True):
            torch.testing.assert_close(t.grad, u.grad, **close)


def test_other_basis_points_do_not_enter() -> None:
    """Even where they are not finite, and in no gradient that stands for a sample."""
    d = Draw("others")
    x, P, c, b = d.tensor(4, 3), d.tensor(5, 2, 3), d.coeff(4, 2), d.tensor(5, 2)
    index = torch.tensor([0, 1, -4, 0])  # 2 and 3 act in samples 1 and 2, 4 in none
    want = MF.manifold_linear_local(x, P, index, c, b)
    P[4], b[4] = math.nan, math.inf
    leaves = [t.requires_grad_() for t in (x, P, c, b)]
    out = MF.manifold_linear_local(x, P, index, c, b)
    assert torch.equal(out, want)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)
    assert not P.grad[4].any()


def test_one_condition_is_one_of_its_own() -> None:
    d = Draw("one")
    x, P, c = d.tensor(4, 3), d.tensor(5, 2, 3), d.coeff(1, 2)
    with pytest.raises(
        ValueError, match=r"expected coeff of shape \[B, L\] = \[4, 2\], got \[1, 2\]"
    ):
        MF.manifold_linear_local(x, P, torch.zeros(1, dtype=torch.int64), c)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": 0}, "index to be a Tensor, got int"),
        ({"input": [1.0]}, "input to be a Tensor, got list"),
        ({"basis": None}, "basis to be a Tensor, got NoneType"),
        ({"coeff": 1.0}, "coeff to be a Tensor, got float"),
    ],
)
def test_bad_calls(change, words) -> None:
    good = {
        "input": torch.ones(4, 7),
        "basis": torch.ones(3, 6, 7),
        "index": torch.zeros(4, dtype=torch.int64),
        "coeff": torch.ones(4, 2),
    }
    MF.manifold_linear_local(**good)
    with pytest.raises(TypeError, match=f"manifold_linear_local: expected {words}"):
        MF.manifold_linear_local(**good | change)


@pytest.mark.parametrize("transform", ["vmap", "compiled vmap"])
def test_says_the_same_under_a_transform(transform: str) -> None:
    """Where coefficients are filled up with zeros, too."""
    x, P, c = torch.ones(2, 4, 7), torch.ones(3, 6, 7), torch.ones(4, 4)

    def run(x: Tensor) -> Tensor:
        return MF.manifold_linear_local(x, P, torch.zeros(4, dtype=torch.int64), c)

    mapped = torch.vmap(run)
    if "compiled" in transform:
        mapped = torch.compile(mapped, backend="eager")
    with pytest.raises(
        Exception, match="manifold_linear_local: expected coeff with 1 <= L <= K = 3"
    ):
        mapped(x)


# The layer


def layer_of(topology: nm.Topology, dtype: torch.dtype = torch.float64) -> nm.nn.ManifoldLinear:
    return nm.nn.ManifoldLinear(3, 2, topology=topology, dtype=dtype)


@every_curve
def test_layer_uses_them(topology) -> None:
    """Where each sample has a condition of its own, and fewer points act than there are."""
    layer, d = layer_of(topology), Draw("layer")
    x, s = d.tensor(5, 2, 3), torch.rand(5, dtype=torch.float64)
    with Calls() as calls:
        out = layer(x, s)
    local = topology.num_local < topology.num_basis
    assert calls.names == ["manifold_linear_local" if local else "manifold_linear"]
    torch.testing.assert_close(out, layer(x, coeff=topology(s)))
    for one in (s[0], s[:1], 0.25):  # one condition for all is folded
        with Calls() as calls:
            out = layer(x, one)
        assert "manifold_linear_local" not in calls.names
        one = one if isinstance(one, Tensor) else torch.tensor(one, dtype=torch.float64)
        torch.testing.assert_close(out, layer(x, coeff=topology(one)))


def test_layer_gradients_are_those_of_dense_coefficients() -> None:
    for topology in (nm.Spline(6, closed=True), nm.PiecewiseLinear(4)):
        layer = layer_of(topology)
        x, s = Draw("grad").tensor(5, 3), torch.rand(5, dtype=torch.float64)
        results = []
        for local in (True, False):
            leaves = [x.clone().requires_grad_(), s.clone().requires_grad_()]
            condition = leaves[1]
            out = (
                layer(leaves[0], condition)
                if local
                else layer(leaves[0], coeff=topology(condition))
            )
            inputs = [*leaves, *layer.parameters()]
            first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
            results.append([*first, *second])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_layer_says_what_it_says_of_dense_coefficients() -> None:
    layer = layer_of(nm.PiecewiseLinear(4), torch.float32)
    x = torch.ones(5, 3)
    for s in (torch.rand(4), torch.rand(5, 1), torch.rand(2, 5)):
        with pytest.raises(ValueError, match="manifold_linear: expected coeff"):
            layer(x, s)
    with pytest.raises(ValueError, match="PiecewiseLinear: expected s in"):
        layer(x, torch.full((5,), 2.0))
    with pytest.raises(ValueError, match="expected either s or coeff, got both"):
        layer(x, torch.rand(5), coeff=torch.rand(5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_takes_conditions_of_any_dtype(dtype: torch.dtype) -> None:
    layer = layer_of(nm.Spline(6), dtype)
    x = torch.ones(5, 3, dtype=dtype)
    for of in (torch.float32, torch.float64, torch.bfloat16):
        s = torch.linspace(0, 1, 5).to(of)
        torch.testing.assert_close(layer(x, s), layer(x, coeff=layer.topology(s).to(dtype)))


def test_conditioned_model_of_such_layers() -> None:
    model = nm.convert(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), nm.Spline(5)
    )
    x, s = torch.randn(6, 3), torch.rand(6)
    want = model.module[1](model.module[0](x, s), s)
    torch.testing.assert_close(model(x, s), want)


def test_layer_out_of_the_domain_in_compiled_code() -> None:
    layer = layer_of(nm.Spline(6), torch.float32)
    x, s = torch.ones(5, 3), torch.tensor([0.1, 0.2, 3.0, 0.4, math.nan])
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, s)
    assert (
        out.isnan().any(1).tolist()
        == out.isnan().all(1).tolist()
        == [False, False, True, False, True]
    )
