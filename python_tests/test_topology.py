"""Topologies against formulas written down twice, integrals taken twice, and every transform."""

import copy
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
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

U = 2.0**-53  # unit round-off of float64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def monomials(s):
    return torch.stack((torch.ones_like(s), s, s * s), -1)


def waves_on_a_box(s):
    x, y = s.unbind(-1)
    return torch.stack((torch.ones_like(x), x.sin(), y * y, x * y), -1)


def one_wave(s):
    return torch.stack((torch.ones_like(s), (math.pi * s).cos()), -1)


def rising(s):
    """A density that is not uniform, for any topology."""
    return 2 + (s if s.ndim == 1 else s[:, 0] ** 2)


OPEN = [Line(), Bezier(1), Bezier(2), Bezier(5), PiecewiseLinear(2), PiecewiseLinear(5)]
OPEN += [Spline(4), Spline(5), Spline(9)]
CLOSED = [Ellipse(), Fourier(1), Fourier(4), PiecewiseLinear(2, closed=True)]
CLOSED += [PiecewiseLinear(5, closed=True), Spline(4, closed=True), Spline(7, closed=True)]
SPACES = [Sphere(), Simplex(1), Simplex(2), Simplex(4), Discrete(1), Discrete(3)]
SPACES += [Discrete(3, probabilities=(0.2, 0.3, 0.5))]
PRODUCTS = [Torus(), Torus(1), Torus(3), Cylinder(), Sphere() * Discrete(2) * Spline(4)]
PRODUCTS += [Discrete(2) * Discrete(3)]
CUSTOM = [
    Custom(monomials, 3),
    Custom(waves_on_a_box, 4, condition_shape=(2,), domain=((-1, 2), (0, 3))),
    Custom(one_wave, 2, domain=(-1, 1), closed=True),
]
ALL = OPEN + CLOSED + SPACES + PRODUCTS + CUSTOM
CONTINUOUS = [t for t in ALL if t.sample(0).is_floating_point()]
SMALL = [Bezier(3), Fourier(2), PiecewiseLinear(4), Spline(5), Spline(5, closed=True), Sphere()]
SMALL += [Simplex(3), Cylinder(), *CUSTOM]


def named(topologies):
    return pytest.mark.parametrize("t", topologies, ids=repr)


def draw(t, n=64, seed=0):
    dtype = torch.float64 if t.sample(0).is_floating_point() else torch.int64
    return t.sample(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def onto_domain(t):
    """A smooth map from free numbers to conditions of t, for derivatives on a curved domain."""
    if isinstance(t, Sphere):
        return lambda v: v / v.norm(dim=-1, keepdim=True)
    return (lambda v: v.softmax(-1)) if isinstance(t, Simplex) else (lambda v: v)


# The same bases, written down a second time in numpy, by their textbook formulas.


def bernstein(n, s):
    return np.stack([math.comb(n, k) * s**k * (1 - s) ** (n - k) for k in range(n + 1)], -1)


def harmonics(n, s):
    waves = [f(2 * np.pi * h * s) for h in range(1, n + 1) for f in (np.cos, np.sin)]
    return np.stack([np.ones_like(s), *waves], -1)


def hats(n, closed, s):
    t = s * n if closed else s * (n - 1)
    away = [np.abs(t - k) for k in range(n)]
    if closed:
        away = [np.minimum(d, n - d) for d in away]
    return np.stack([np.maximum(0, 1 - d) for d in away], -1)


def de_boor(knots, k, p, x):
    if p == 0:
        return ((knots[k] <= x) & (x < knots[k + 1])).astype(float)
    left, right = knots[k + p] - knots[k], knots[k + p + 1] - knots[k + 1]
    total = np.zeros_like(x)
    if left > 0:
        total += (x - knots[k]) / left * de_boor(knots, k, p - 1, x)
    if right > 0:
        total += (knots[k + p + 1] - x) / right * de_boor(knots, k + 1, p - 1, x)
    return total


def cubic(n, closed, s):
    if not closed:
        knots = [0.0] * 4 + [i / (n - 3) for i in range(1, n - 3)] + [1.0] * 4
        return np.stack([de_boor(knots, k, 3, s) for k in range(n)], -1)
    x = [np.abs((s * n - k + n / 2) % n - n / 2) for k in range(n)]  # the cardinal B-spline
    near, far = [2 / 3 - d**2 + d**3 / 2 for d in x], [np.maximum(0, 2 - d) ** 3 / 6 for d in x]
    return np.stack([np.where(d < 1, a, b) for d, a, b in zip(x, near, far, strict=True)], -1)


REFERENCE = [(t, lambda s, n=t.num_basis - 1: bernstein(n, s)) for t in OPEN[:4]]
REFERENCE += [(Ellipse(), lambda s: harmonics(1, s)), (Fourier(4), lambda s: harmonics(4, s))]
REFERENCE += [
    (PiecewiseLinear(n, closed), lambda s, n=n, closed=closed: hats(n, closed, s))
    for n, closed in ((2, False), (5, False), (2, True), (5, True))
]
REFERENCE += [
    (Spline(n, closed), lambda s, n=n, closed=closed: cubic(n, closed, s))
    for n, closed in ((4, False), (5, False), (9, False), (4, True), (7, True))
]
referenced = pytest.mark.parametrize(("t", "basis"), REFERENCE, ids=lambda x: repr(x)[:40])


@referenced
def test_coefficients_are_the_textbook_basis(t, basis):
    s = np.append(np.random.default_rng(0).random(500), [0.0, 0.25, 0.5])
    # The largest error: harmonic 4, whose angle of up to 8 pi is rounded three times on each side.
    np.testing.assert_allclose(t(torch.from_numpy(s)).numpy(), basis(s), rtol=0, atol=256 * U)


@referenced
def test_gram_is_the_integral(t, basis):
    panels, order = 840, 8  # 840 is divisible by every number of segments
    x, w = np.polynomial.legendre.leggauss(order)
    s = ((np.arange(panels)[:, None] + (x + 1) / 2) / panels).ravel()
    c, weights = basis(s), np.tile(w / 2, panels) / panels
    gram = c.T @ (weights[:, None] * c)
    np.testing.assert_allclose(t.gram(), gram, rtol=0, atol=panels * order * U)


def test_gram_of_sphere_is_the_surface_integral():
    theta = (np.arange(2000) + 0.5) * np.pi / 2000  # midpoint rule: error about step^2 / 24
    phi = np.arange(8) * np.pi / 4
    theta, phi = (a.ravel() for a in np.meshgrid(theta, phi))
    xyz = np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)
    c, w = np.stack([np.ones_like(theta), *xyz]), np.sin(theta) / np.sin(theta).sum()
    np.testing.assert_allclose(Sphere().gram(), (c * w) @ c.T, rtol=0, atol=(np.pi / 2000) ** 2)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_gram_of_simplex_holds_dirichlet_moments(n):
    gram = Simplex(n).gram()
    for i, j in itertools.product(range(n), repeat=2):
        moment = math.factorial(n - 1) * (2 if i == j else 1) / math.factorial(n + 1)
        assert gram[i, j].item() == pytest.approx(moment, rel=4 * U)


@pytest.mark.parametrize(
    ("t", "inverse"),
    [
        (Line(), [[4, -2], [-2, 4]]),
        (Bezier(2), [[9, -9, 3], [-9, 21, -9], [3, -9, 9]]),
        (Ellipse(), np.diag([1, 2, 2])),
        (Fourier(3), np.diag([1, 2, 2, 2, 2, 2, 2])),
        (Torus(), np.diag([1, 2, 2, 2, 4, 4, 2, 4, 4])),
        (Cylinder(), np.kron(np.diag([1, 2, 2]), [[4, -2], [-2, 4]])),
        (Sphere(), np.diag([1, 3, 3, 3])),
        (Simplex(3), [[9, -3, -3], [-3, 9, -3], [-3, -3, 9]]),
        (Discrete(4), np.diag([4, 4, 4, 4])),
        (Discrete(2, (0.25, 0.75)), np.diag([4, 1 / 0.75])),
    ],
    ids=repr,
)
def test_inverse_gram_of_the_table(t, inverse):
    np.testing.assert_array_equal(t.gram_inverse().numpy(), np.array(inverse, dtype=float))


@pytest.mark.parametrize("n", range(1, 13))
def test_inverse_gram_of_bezier_is_correctly_rounded(n):
    """Against Gauss-Jordan elimination in fractions."""
    k, comb = range(n + 1), math.comb

    def gram(i, j):
        return Fraction(comb(n, i) * comb(n, j), (2 * n + 1) * comb(2 * n, i + j))

    rows = [[gram(i, j) for j in k] + [Fraction(i == j) for j in k] for i in k]
    for i in k:
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in set(k) - {i}:
            rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    exact = [[float(x) for x in row[n + 1 :]] for row in rows]
    np.testing.assert_array_equal(Bezier(n).gram_inverse().numpy(), np.array(exact))


@named([*ALL, Bezier(8), Spline(40), *(t.with_density(rising) for t in SMALL)])
def test_inverse_gram_inverts(t):
    gram, inverse = t.gram(), t.gram_inverse()
    assert gram.dtype is inverse.dtype is torch.float64
    eye = torch.eye(t.num_basis, dtype=torch.float64)
    # Residual of a computed inverse: condition number times round-off, K terms a sum, K sums.
    bound = 8 * t.num_basis**2 * U * torch.linalg.cond(gram).item()
    torch.testing.assert_close(gram @ inverse, eye, rtol=0, atol=bound)
    assert bound < 1e-7


@named([t for t in OPEN + CLOSED if not isinstance(t, Fourier)] + [Simplex(4), Discrete(3)])
def test_partition_of_unity(t):
    total = t(draw(t)).double().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=16 * U)


@named(OPEN)
def test_open_curve_meets_its_end_points(t):
    ends = torch.zeros(2, t.num_basis)
    ends[0, 0] = ends[1, -1] = 1
    assert torch.equal(t([0.0, 1.0]), ends)


@pytest.mark.parametrize("closed", [False, True])
def test_piecewise_linear_meets_every_point(closed):
    t = PiecewiseLinear(5, closed)
    assert torch.equal(t(torch.arange(5) / (5 if closed else 4)), torch.eye(5))


@named(CLOSED)
def test_closed_curve_wraps(t):
    s = torch.arange(16) / 16  # dyadic, so that s + turns is exact in float32
    for turns in (1, -1, 3, 2**19, -(2**19)):
        assert torch.equal(t(s + turns), t(s))


def slope(f):
    return lambda s: torch.func.jvp(f, (s,), (torch.ones_like(s),))[1]


@named([Spline(7), Spline(7, closed=True)])
def test_spline_is_smooth_to_second_order_and_no_further(t):
    knots = torch.arange(0 if t.closed else 1, 7 if t.closed else 4) / (7 if t.closed else 4)
    step, knots, f = 1e-7, knots.double(), t
    for order in range(4):
        jump = (f(knots + step) - f(knots - step)).abs().amax(-1)
        # Smooth: the next derivative, at most 6 * 7^(order + 1), over the two steps.
        assert (jump > 1).all() if order == 3 else (jump < 12 * 7 ** (order + 1) * step).all()
        f = slope(f)


def test_derivative_at_a_knot_is_that_of_the_right():
    left, right = [-2.0, 2.0, 0.0], [0.0, -2.0, 2.0]
    s = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(slope(PiecewiseLinear(3))(s), torch.tensor([left, right, right]))


# Products


def test_product_is_the_kronecker_product():
    a, b = Spline(5, closed=True), Simplex(3)
    t, sa, sb = a * b, draw(a), draw(b, seed=1)
    assert (t.num_basis, t.condition_shape) == (15, (4,))
    c = t(torch.cat((sa[:, None], sb), -1))
    assert torch.equal(c, (a(sa)[:, :, None] * b(sb)[:, None, :]).reshape(64, 15))
    assert torch.equal(t.gram(), torch.kron(a.gram(), b.gram()))
    assert torch.equal(t.gram_inverse(), torch.kron(a.gram_inverse(), b.gram_inverse()))
    assert torch.equal(t.constant(), torch.kron(a.constant(), b.constant()))


def test_product_flattens_and_names():
    a, b, c = Line(), Ellipse(), Discrete(2)
    assert (a * b) * c == a * (b * c) == Product((a, b, c))
    s = draw(Torus(3))
    assert torch.equal(Torus(3)(s), Product([b] * 3)(s))
    assert torch.equal(Cylinder()(s[:, :2]), (b * a)(s[:, :2]))
    weighted = (a * b).with_density(rising) * c
    assert [f.num_basis for f in weighted.factors] == [6, 2]


def test_product_with_tasks_takes_whole_numbers():
    t = Discrete(3) * Ellipse()
    s = torch.tensor([[2.0, 0.25], [0.0, 0.5]])
    tasks, phases = Discrete(3)([2, 0]), Ellipse()([0.25, 0.5])
    assert torch.equal(t(s), (tasks[:, :, None] * phases[:, None, :]).reshape(2, 9))
    with pytest.raises(ValueError, match=r"got \[0.5, 0.25\] at index 0"):
        t([[0.5, 0.25]])
    both = Discrete(2) * Discrete(3)
    assert torch.equal(both([[1, 2]]), torch.eye(6)[5:])
    with pytest.raises(TypeError, match="integer dtype"):
        both([[1.0, 2.0]])


# Quadrature, constants, densities, sampling


@named([*ALL, *(t.with_density(rising) for t in SMALL)])
def test_quadrature(t):
    nodes, weights = t.quadrature()
    assert nodes.shape == (len(weights), *t.condition_shape)
    assert nodes.dtype is (torch.float64 if t.sample(0).is_floating_point() else torch.int64)
    assert (weights > 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=len(weights) * U)
    c = t(nodes).double()  # every node lies in the domain
    gram = c.T @ (weights[:, None] * c)
    scale = max(1.0, c.abs().max().item()) ** 2
    torch.testing.assert_close(gram, t.gram(), rtol=0, atol=16 * len(weights) * U * scale)


@named(ALL)
def test_constant(t):
    a = t.constant()
    assert a.dtype is torch.float64
    residual = t(draw(t, seed=3)).double() @ a - 1
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=64 * U)
    assert torch.equal(a, a.round())  # none of these needs a fraction


def test_constant_that_is_not_whole():
    t = Custom(lambda s: torch.stack((4 - s, s), -1), 2)
    torch.testing.assert_close(t.constant(), torch.full((2,), 0.25, dtype=torch.float64))


def test_constant_out_of_the_span():
    with pytest.raises(ValueError, match=r"Custom: expected the constant function in the span"):
        Custom(lambda s: torch.stack((s, s * s), -1), 2).constant()


THIRD = [[1, 0, 0, 1 / 3], [0, 1 / 3, 0, 0], [0, 0, 1 / 3, 0], [1 / 3, 0, 0, 1 / 3]]
UNIFORM, RISING = np.array([[2, 1], [1, 2]]) / 6, np.array([[1, 1], [1, 3]]) / 6  # for a line
WEIGHTED = [
    (Line().with_density(lambda s: 10 * s), RISING),
    (
        Ellipse().with_density(lambda s: 1 + (2 * math.pi * s).cos()),
        [[1, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0.5]],
    ),
    (Sphere().with_density(lambda s: 1 + s[:, 2]), THIRD),
    (
        Simplex(3).with_density(lambda s: s[:, 0]),
        [[0.3, 0.1, 0.1], [0.1, 0.1, 0.05], [0.1, 0.05, 0.1]],
    ),
    (Discrete(3).with_density(lambda s: 1 + s), np.diag([1 / 6, 2 / 6, 3 / 6])),
    (Discrete(2, (0.25, 0.75)).with_density(lambda s: 3 - 2 * s), np.diag([0.5, 0.5])),
    ((Line() * Line()).with_density(lambda s: s[:, 1]), np.kron(UNIFORM, RISING)),
    (Line().with_density(lambda s: s) * Line(), np.kron(RISING, UNIFORM)),
]


@pytest.mark.parametrize(("t", "gram"), WEIGHTED, ids=lambda x: repr(x)[:20])
def test_with_density_changes_the_measure(t, gram):
    # The sum over at most 128^2 nodes.
    np.testing.assert_allclose(t.gram(), gram, rtol=0, atol=128**2 * U)
    assert_moments(t)


def test_with_density_keeps_the_coefficients():
    s = draw(Spline(5))
    assert torch.equal(Spline(5).with_density(rising)(s), Spline(5)(s))


def assert_moments(t, n=20_000):
    c = t(draw(t, n)).double()  # every sample lies in the domain
    mean, square = c.T @ c / n, c.square().T @ c.square() / n  # of the products c_j c_k
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    error = (mean - t.gram()).abs()
    assert (error <= 5 * deviation / math.sqrt(n) + n * U).all()  # five standard errors


@named(ALL)
def test_samples_follow_the_density(t):
    assert_moments(t)


def test_rejection_finds_a_peak_between_the_nodes():
    """The peak holds 0.204 / 1.2 of the mass; a bound taken at the nodes would give it 0.004."""

    def density(s):
        return 1 + 50 * ((s - 0.5).abs() < 0.002)

    t = Line().with_density(density)
    assert density(t.quadrature()[0]).max() == 1
    s = t.sample(20_000, generator=torch.Generator().manual_seed(0))
    share, expected = (density(s) > 1).double().mean().item(), 0.204 / 1.2
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)


def test_rejection_begins_anew_when_the_bound_grows():
    """A quarter of each first batch is kept before the peak, 0.1 / 0.35 of the mass, is drawn."""

    def density(s):
        return (s < 0.25) + 100.0 * ((s - 0.5).abs() < 0.0005)

    t, generator = Line().with_density(density), torch.Generator().manual_seed(0)
    assert density(t.quadrature()[0]).max() == 1
    s = torch.cat([t.sample(1024, generator=generator) for _ in range(12)])
    share, expected, missed = (s > 0.25).double().mean().item(), 0.1 / 0.35, math.exp(-4)
    deviation = math.sqrt(expected * (1 - expected) / len(s))
    # Four batches without a draw from the peak end a sample that does not know of it.
    assert abs(share - expected) < missed * expected + 3 * deviation


def test_with_density_replaces_an_earlier_one():
    def falling(s):
        return 2 - s

    assert Line().with_density(rising).with_density(falling) == Line().with_density(falling)


@pytest.mark.parametrize(
    ("density", "words"),
    [
        (lambda s: -s, "finite and >= 0"),
        (lambda s: s / 0, "finite and >= 0"),
        (lambda s: s.sum(), r"density\(s\) of shape \[128\]"),
        (lambda s: 0 * s, "> 0 somewhere"),
    ],
)
def test_density_must_be_one(density, words):
    with pytest.raises(ValueError, match=f"^Line: expected .*{words}.*, got "):
        Line().with_density(density)


def test_density_in_too_many_dimensions():
    assert Torus(7).with_density(rising).density is rising
    with pytest.raises(ValueError, match=r"Torus: expected at most 7 dimensions to integrate"):
        Torus(8).with_density(rising)


@named(ALL)
def test_sample_is_reproducible_and_shaped(t):
    a, b = (t.sample(5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (5, *t.condition_shape)
    assert t.sample(0).shape == (0, *t.condition_shape)
    for dtype in (torch.float64, torch.float16) if a.is_floating_point() else (torch.int32,):
        s = t.sample(5, dtype=dtype)
        assert s.dtype is dtype
        assert t(s).isfinite().all()
    assert t.sample(3, device="meta").device.type == "meta"


def test_sample_refuses():
    with pytest.raises(TypeError, match=r"^Line: expected a floating dtype, got torch.int64"):
        Line().sample(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^Discrete: expected an integer dtype, got torch.float32"):
        Discrete(3).sample(3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^Line: expected n >= 0, got -1"):
        Line().sample(-1)


# Custom


def test_custom_basis_of_the_same_span_has_the_transformed_gram():
    change = torch.tensor([[1, 1, 1], [0, 0.5, 1], [0, 0, 1]], dtype=torch.float64)
    gram = change @ Bezier(2).gram() @ change.T
    torch.testing.assert_close(Custom(monomials, 3).gram(), gram, rtol=0, atol=128 * U)


def test_custom_box():
    t = Custom(waves_on_a_box, 4, condition_shape=(2,), domain=((-1, 2), (0, 3)))
    gram = t.gram()
    mean_sin = (math.cos(1) - math.cos(2)) / 3  # mean over [-1, 2]
    assert gram[0, 1].item() == pytest.approx(mean_sin, abs=1e4 * U)
    assert gram[2, 2].item() == pytest.approx(3**4 / 5, abs=1e6 * U)
    assert gram[0, 3].item() == pytest.approx(0.5 * 1.5, abs=1e4 * U)
    low, high = t.sample(1000).aminmax(dim=0)
    assert (low[0] < -0.9 and high[0] > 1.9) and (low[1] < 0.1 and high[1] > 2.9)
    with pytest.raises(ValueError, match=r"expected s in \[-1, 2\] x \[0, 3\], got \[0.0, 3.5\]"):
        t([0, 3.5])


def test_custom_closed_wraps_into_its_domain():
    t = Custom(one_wave, 2, domain=(-1, 1), closed=True)
    s = torch.arange(-8, 8) / 8
    assert torch.equal(t(s + 6), t(s))
    assert torch.equal(t(s), one_wave(s))
    np.testing.assert_allclose(t.gram(), [[1, 0], [0, 0.5]], rtol=0, atol=128 * U)


def test_custom_follows_the_dtype_of_s():
    t = Custom(lambda s: torch.ones(*s.shape, 1), 1)
    assert t(torch.zeros(2, dtype=torch.float64)).dtype is torch.float64


def test_singular_gram_is_named():
    t = Custom(lambda s: torch.stack((s, 2 * s), -1), 2)
    words = r"^Custom: expected a Gram matrix of condition number below 1e\+12, .*fewer.*damping"
    with pytest.raises(ValueError, match=words):
        t.gram_inverse()
    assert t.gram().shape == (2, 2)  # still there, to be damped


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@named([Sphere(), Simplex(5)])
def test_normalising_in_half_precision_is_good_enough(t, dtype):
    t(draw(t, n=1000).to(dtype))


@pytest.mark.parametrize("t", [Ellipse(), Fourier(4), Spline(5, closed=True)], ids=repr)
def test_large_phases_keep_their_precision(t):
    turns = 2**40
    s = torch.arange(0, 1, 2**-10, dtype=torch.float64)  # exact when shifted by 2^40 turns
    assert torch.equal(t(s + turns), t(s))
    far = torch.tensor(1e6 + 0.1, dtype=torch.float64)
    assert torch.equal(
        t(far), t(torch.tensor(float(Fraction(far.item()) % 1), dtype=torch.float64))
    )


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


def test_dtype_of_tasks():
    for dtype in (torch.int64, torch.int32, torch.uint8):
        c = Discrete(3)(torch.tensor([2, 0], dtype=dtype))
        assert c.dtype is torch.float32
        assert torch.equal(c, torch.eye(3)[[2, 0]])


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


def test_coefficients_never_alias_the_condition():
    s = torch.tensor([0.5, 0.5])
    Simplex(2)(s).zero_()
    assert s.tolist() == [0.5, 0.5]


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


def test_product_with_anything_else_is_a_type_error():
    with pytest.raises(TypeError, match="unsupported operand"):
        Line() * 2


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


def test_inverse_is_computed_once_and_never_lent():
    calls = []

    def function(s):
        calls.append(s)
        return monomials(s)

    t = Custom(function, 3)
    expected = t.gram_inverse().clone()
    count = len(calls)
    t.gram_inverse().zero_()
    assert torch.equal(t.gram_inverse(), expected)
    assert len(calls) == count


def test_a_learned_basis_is_integrated_without_a_graph():
    weight = torch.ones(3, requires_grad=True)
    t = Custom(lambda s: monomials(s) * weight, 3)
    assert not t.gram().requires_grad
    assert not t.gram_inverse().requires_grad
    assert not t.constant().requires_grad
    assert t(torch.rand(2)).requires_grad
