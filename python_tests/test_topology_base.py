"""What every topology does with a condition: domains, types, shapes and every transform."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from topologies import (
    ALL,
    CONTINUOUS,
    CUSTOM,
    SMALL,
    U,
    draw,
    monomials,
    named,
    one_wave,
    onto_domain,
    rising,
)
from torch.autograd import gradcheck, gradgradcheck

from neuromod_ext import topology
from neuromod_ext.topology import (
    Bezier,
    Custom,
    Cylinder,
    Discrete,
    Ellipse,
    Fourier,
    Line,
    PiecewiseLinear,
    Product,
    Simplex,
    Sphere,
    Spline,
    Torus,
)

# Derivatives and transforms


@named(SMALL)
def test_derivatives(t):
    f = onto_domain(t)
    s = draw(t, n=3).requires_grad_()

    def c(v):
        return t(f(v))

    assert gradcheck(c, s, check_forward_ad=True, check_batched_grad=True, nondet_tol=0)
    assert gradgradcheck(c, s, check_fwd_over_rev=True, nondet_tol=0)


@named([*SMALL, Discrete(3), Discrete(2) * Ellipse()])
def test_vmap_equals_batch(t):
    s = draw(t, n=6)
    assert torch.equal(torch.vmap(t)(s), t(s))
    pairs = s.reshape(2, 3, *t.condition_shape)
    assert torch.equal(torch.vmap(t, in_dims=1, out_dims=1)(pairs), t(pairs))


@named(SMALL)
def test_function_transforms_agree(t):
    s, v = draw(t, n=4), draw(t, n=4, seed=1)
    value, tangent = torch.func.jvp(t, (s,), (v,))
    assert torch.equal(value, t(s))
    weight = torch.linspace(-1, 1, t.num_basis, dtype=torch.float64)
    leaf = s.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(t(leaf), leaf, weight.expand_as(value))
    slack = 256 * t.num_basis * U * max(1.0, tangent.abs().sum().item())
    assert abs((tangent * weight).sum() - (pulled * v).sum()) < slack
    forward, reverse = torch.func.jacfwd(t)(s[0]), torch.func.jacrev(t)(s[0])
    torch.testing.assert_close(forward, reverse, rtol=1e-13, atol=1e-13)
    hessian, twice = torch.func.hessian(t)(s[0]), torch.func.jacrev(torch.func.jacrev(t))(s[0])
    torch.testing.assert_close(hessian, twice, rtol=1e-12, atol=1e-12)


@named([Bezier(3), Fourier(2), Spline(5, True), Simplex(3), Cylinder(), CUSTOM[1], Discrete(3)])
def test_compile_in_one_graph(t):
    torch._dynamo.reset()
    compiled = torch.compile(
        t, fullgraph=True, backend="aot_eager", dynamic=isinstance(t, Cylinder)
    )
    for n in (5, 7) if isinstance(t, Cylinder) else (5,):
        values = []
        for f in (compiled, t):
            s = draw(t, n=n)
            c = f(s.requires_grad_(s.is_floating_point()))
            values.append([c.detach()])
            if c.requires_grad:
                values[-1].append(torch.autograd.grad(c.square().sum(), s)[0])
        torch.testing.assert_close(*values, rtol=1e-13, atol=1e-13)


def test_export_with_a_dynamic_batch():
    class Coefficients(torch.nn.Module):
        def forward(self, s):
            return (Spline(4, closed=True) * Line())(s)

    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(
        Coefficients(), (torch.rand(4, 2),), dynamic_shapes=shapes
    ).module()
    s = torch.rand(7, 2)
    assert torch.equal(program(s), Coefficients()(s))
    s[3, 1] = 1.5
    assert program(s).isnan().all(-1).tolist() == [i == 3 for i in range(7)]


# Domains

CLAMP = "; clamp it or use a closed topology"
NORM = "; divide it by its norm"
SUM = "; apply softmax, or divide it by its sum"
NAN, INF = math.nan, math.inf
BAD = [
    (Line(), [0.5, 0.1, 1.5], f"in [0, 1], got 1.5 at index 2{CLAMP}"),
    (Line(), -0.5, f"in [0, 1], got -0.5{CLAMP}"),
    (Bezier(2), [[0.0, 0.0], [0.0, 2.0]], f"in [0, 1], got 2.0 at index (1, 1){CLAMP}"),
    (Spline(4), [NAN], f"in [0, 1], got nan at index 0{CLAMP}"),
    (PiecewiseLinear(3), [INF], f"in [0, 1], got inf at index 0{CLAMP}"),
    (PiecewiseLinear(3, closed=True), [0.0, -INF], "finite, got -inf at index 1"),
    (Spline(4, closed=True), [NAN], "finite, got nan at index 0"),
    (Ellipse(), [7.0, NAN], "finite, got nan at index 1"),
    (Fourier(2), INF, "finite, got inf"),
    (Sphere(), [[0, 0, 1], [0.5, 1, 1]], f"of unit norm, got [0.5, 1.0, 1.0] at index 1{NORM}"),
    (Sphere(), [NAN] * 3, f"of unit norm, got [nan, nan, nan]{NORM}"),
    (Simplex(2), [0.5, 0.75], f"nonnegative and summing to 1, got [0.5, 0.75]{SUM}"),
    (Simplex(2), [[-0.5, 1.5]], f"nonnegative and summing to 1, got [-0.5, 1.5] at index 0{SUM}"),
    (Discrete(4), [0, 3, 4], "an integer in [0, 4), got 4 at index 2"),
    (Discrete(4), -1, "an integer in [0, 4), got -1"),
    (Cylinder(), [[9.0, 1.5]], "(finite, in [0, 1]), got [9.0, 1.5] at index 0"),
    (Torus(), [[0.0, NAN]], "(finite, finite), got [0.0, nan] at index 0"),
    (Discrete(2) * Line(), [2.0, 0.5], "(an integer in [0, 2), in [0, 1]), got [2.0, 0.5]"),
    (Custom(monomials, 3, domain=(2, 4)), 5.0, f"in [2, 4], got 5.0{CLAMP}"),
    (Custom(one_wave, 2, closed=True), INF, "finite, got inf"),
]


@pytest.mark.parametrize(("t", "s", "message"), BAD, ids=lambda x: repr(x)[:30])
def test_out_of_domain_is_refused(t, s, message):
    with pytest.raises(ValueError) as error:
        t(s)
    assert str(error.value) == f"{type(t).__name__}: expected s {message}"


def mixed(t, s):
    """Two good conditions, the last of s, a good one."""
    wrong = torch.as_tensor(s).reshape(-1, *t.condition_shape)[-1:]
    good = t.sample(3, generator=torch.Generator().manual_seed(0)).to(wrong.dtype)
    return torch.cat((good[:2], wrong, good[2:])), t(good)


def assert_only_the_third_is_nan(c, good):
    assert c.isnan().all(-1).tolist() == [False, False, True, False]
    torch.testing.assert_close(c[[0, 1, 3]], good, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("t", "s", "message"), BAD, ids=lambda x: repr(x)[:30])
def test_out_of_domain_is_nan_under_vmap(t, s, message):
    s, good = mixed(t, s)
    assert_only_the_third_is_nan(torch.vmap(t)(s), good)


ONE_OF_EACH = [bad for bad in BAD if type(bad[0]) not in (Bezier, Fourier, PiecewiseLinear)][::2]


@pytest.mark.parametrize(("t", "s", "message"), ONE_OF_EACH, ids=lambda x: repr(x)[:30])
def test_out_of_domain_is_nan_when_compiled(t, s, message):
    torch._dynamo.reset()
    s, good = mixed(t, s)
    compiled = torch.compile(t, fullgraph=True, backend="aot_eager")
    assert_only_the_third_is_nan(compiled(s), good)


@pytest.mark.parametrize("t", [Line(), Spline(5), PiecewiseLinear(3)], ids=repr)
def test_derivatives_out_of_domain_are_nan(t):
    s = torch.tensor([0.25, 0.75, 1.5, 0.5])
    value, tangent = torch.func.jvp(t, (s,), (torch.ones(4),))
    grad = torch.func.grad(lambda s: t(s)[..., 0].sum())(s)
    for x in (value, tangent, grad[:, None]):
        assert x.isnan().all(-1).tolist() == [False, False, True, False]
        assert x.isnan().any(-1).tolist() == [False, False, True, False]


def test_values_are_not_read_from_subclasses_and_other_devices():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert Line()(torch.rand(3)).shape == (3, 2)
    assert Line()(torch.rand(3, device="meta")).shape == (3, 2)

    class Tagged(torch.Tensor):
        pass

    assert Line()(torch.tensor([0.5, 1.5]).as_subclass(Tagged)).isnan().any(-1).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"got 1\.5"):
        Line()(torch.nn.Parameter(torch.tensor(1.5)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_forgiven_and_no_more(dtype):
    eps = torch.finfo(dtype).eps
    for s in (-2 * eps, 1 + 2 * eps):
        Line()(torch.tensor(s, dtype=dtype))
    for s in (-3 * eps, 1 + 3 * eps):
        with pytest.raises(ValueError, match="Line: expected s in"):
            Line()(torch.tensor(s, dtype=dtype))
    for t, s in ((Sphere(), [0.0, 0, 1]), (Simplex(3), [0.0, 0, 1])):
        s = torch.tensor(s, dtype=dtype)
        t(s * (1 + 0.5 * math.sqrt(eps)))
        with pytest.raises(ValueError, match=r"Sphere|Simplex"):
            t(s * (1 + 2 * math.sqrt(eps)))


# Types, shapes, values


@named(CONTINUOUS)
def test_dtype_of_the_coefficients(t):
    s = draw(t)
    assert t(s).dtype is torch.float64
    assert t(s.float()).dtype is torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        s = t.sample(8, dtype=dtype)
        assert t(s).dtype is torch.float32
        if not isinstance(t, Sphere | Simplex | Product):  # whose domain is wider in half precision
            assert torch.equal(t(s), t(s.float()))


@pytest.mark.parametrize(
    ("t", "s"),
    [
        (Line(), 1),
        (Ellipse(), -3),
        (Sphere(), [0, 0, 1]),
        (Simplex(2), [1, 0]),
        (Cylinder(), [7, 1]),
        (Discrete(2) * Line(), [1, 0]),
    ],
    ids=repr,
)
def test_whole_numbers_are_conditions(t, s):
    c = t(torch.tensor(s))
    assert c.dtype is torch.float32
    assert torch.equal(c, t(torch.tensor(s).float()))


def test_autocast_and_defaults_change_nothing():
    t = Cylinder() * Spline(5)
    s, gram = draw(t).float(), t.gram()
    c = t(s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(t(s), c)
        assert torch.equal(t.gram(), gram)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.vmap(t)(s).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        for u in (*ALL, Line().with_density(rising)):
            fresh = copy.copy(u)
            assert {x.device.type for x in (fresh.gram(), fresh.gram_inverse())} == {"cpu"}
            assert {x.device.type for x in (fresh.constant(), *fresh.quadrature())} == {"cpu"}


@named(ALL)
def test_shapes(t):
    s = draw(t, n=6)
    c = t(s)
    assert c.shape == (6, t.num_basis)
    assert torch.equal(t(s.reshape(2, 3, *t.condition_shape)), c.reshape(2, 3, -1))
    assert torch.equal(t(s[0]), c[0])
    assert t(s[:0]).shape == (0, t.num_basis)
    assert torch.equal(t(s[0].tolist()), t(torch.tensor(s[0].tolist())))
    strided = s.repeat_interleave(2, 0)[::2]
    assert torch.equal(t(strided), c)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Line()(True), TypeError, "Line: expected s of a real dtype, got torch.bool"),
        (lambda: Line()(1j), TypeError, "Line: expected s of a real dtype, got torch.complex64"),
        (
            lambda: Discrete(2)(0.5),
            TypeError,
            "Discrete: expected s of an integer dtype, got torch.float32",
        ),
        (
            lambda: Discrete(2)(False),
            TypeError,
            "Discrete: expected s of an integer dtype, got torch.bool",
        ),
        (
            lambda: Sphere()(torch.zeros(4, 2)),
            ValueError,
            "Sphere: expected s of shape [*, 3], got [4, 2]",
        ),
        (lambda: Torus()(0.5), ValueError, "Torus: expected s of shape [*, 2], got []"),
        (lambda: Bezier(0), ValueError, "Bezier: expected degree >= 1, got 0"),
        (lambda: Bezier(2.0), TypeError, "Bezier: expected an integer degree, got 2.0"),
        (lambda: Bezier(True), TypeError, "Bezier: expected an integer degree, got True"),
        (lambda: Fourier(0), ValueError, "Fourier: expected harmonics >= 1, got 0"),
        (lambda: Spline(3), ValueError, "Spline: expected n >= 4, got 3"),
        (lambda: Spline(3, True), ValueError, "Spline: expected n >= 4, got 3"),
        (lambda: PiecewiseLinear(1), ValueError, "PiecewiseLinear: expected n >= 2, got 1"),
        (lambda: Simplex(0), ValueError, "Simplex: expected n >= 1, got 0"),
        (lambda: Discrete(0), ValueError, "Discrete: expected n >= 1, got 0"),
        (lambda: Torus(0), ValueError, "Torus: expected dims >= 1, got 0"),
        *(
            (
                lambda p=p: Discrete(2, p),
                ValueError,
                f"Discrete: expected 2 probabilities > 0 summing to 1, got {p}",
            )
            for p in ((), (1.0,), (0.5, 0.25), (0.0, 1.0), (NAN, 0.5))
        ),
        (lambda: Product(()), TypeError, "Product: expected one or more topologies, got ()"),
        (
            lambda: Product((Line(), 2)),
            TypeError,
            "Product: expected one or more topologies, got (Line(), 2)",
        ),
        (lambda: Custom(3, 1), TypeError, "Custom: expected a callable function, got 3"),
        (
            lambda: Custom(monomials, 3, (2, 2)),
            ValueError,
            "Custom: expected condition_shape () or (d,), got (2, 2)",
        ),
        *(
            (
                lambda d=d: Custom(monomials, 3, domain=d),
                ValueError,
                f"Custom: expected domain (low, high) with low < high, got {d}",
            )
            for d in ((1, 0), (0, INF), 3, ((0, 1), (0, 1)))
        ),
        (
            lambda: Custom(monomials, 2)([0.5] * 4),
            ValueError,
            "Custom: expected function(s) of shape [4, 2], got [4, 3]",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error) as refused:
        make()
    assert str(refused.value) == message


@named([*ALL, Line().with_density(rising), Torus().with_density(rising)])
def test_topologies_are_values(t):
    t.gram_inverse()  # fill the cache
    for twin in (copy.copy(t), copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert twin is not t
        assert twin == t
        assert hash(twin) == hash(t)
        assert torch.equal(twin.gram_inverse(), t.gram_inverse())
    if "function" not in repr(t):
        assert eval(repr(t), vars(topology)) == t
    with pytest.raises(AttributeError, match="is immutable: num_basis cannot be assigned"):
        t.num_basis = 7


def test_different_topologies_differ():
    different = [t for t in ALL if t != Fourier(1)] + [t.with_density(rising) for t in SMALL]
    for a, b in itertools.combinations(different, 2):
        assert a != b
    assert Line() != Bezier(1)
    assert Line() != "Line()"
    assert Discrete(2) == Discrete(np.int64(2))
    assert len({Line(), Line(), Spline(4), Spline(4, closed=False)}) == 2
