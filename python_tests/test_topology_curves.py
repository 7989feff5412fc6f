"""Curves and boxes against their textbook formulas, and integrals taken twice."""

import math
from fractions import Fraction
from inspect import isfunction

import numpy as np
import pytest
import torch
from topologies import CLOSED, OPEN, U, draw, monomials, named, one_wave, waves_on_a_box

from neuromod_ext.topology import (
    Bezier,
    Custom,
    Discrete,
    Ellipse,
    Fourier,
    PiecewiseLinear,
    Simplex,
    Spline,
)

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
referenced = pytest.mark.parametrize(
    ("t", "basis"), REFERENCE, ids=lambda x: None if isfunction(x) else repr(x)[:40]
)


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


@pytest.mark.parametrize("t", [Ellipse(), Fourier(4), Spline(5, closed=True)], ids=repr)
def test_large_phases_keep_their_precision(t):
    turns = 2**40
    s = torch.arange(0, 1, 2**-10, dtype=torch.float64)  # exact when shifted by 2^40 turns
    assert torch.equal(t(s + turns), t(s))
    far = torch.tensor(1e6 + 0.1, dtype=torch.float64)
    assert torch.equal(
        t(far), t(torch.tensor(float(Fraction(far.item()) % 1), dtype=torch.float64))
    )


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


def test_ill_conditioned_closed_forms_are_refused():
    assert Bezier(20).gram_inverse().isfinite().all()
    for t in (Bezier(21), Bezier(20) * Bezier(1)):
        with pytest.raises(ValueError, match=r"expected a Gram matrix of condition number below"):
            t.gram_inverse()
