"""Densities: Gram matrices and their inverses, quadrature, constants, samples."""

import math

import numpy as np
import pytest
import torch
from topologies import ALL, SMALL, U, assert_moments, draw, named, rising

from neuromod_ext.topology import (
    Bezier,
    Custom,
    Cylinder,
    Discrete,
    Ellipse,
    Fourier,
    Line,
    Simplex,
    Sphere,
    Spline,
    Torus,
)


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


@named([*ALL, Bezier(8), Spline(40), *(t.with_density(rising) for t in SMALL)])
def test_inverse_gram_inverts(t):
    gram, inverse = t.gram(), t.gram_inverse()
    assert gram.dtype is inverse.dtype is torch.float64
    eye = torch.eye(t.num_basis, dtype=torch.float64)
    # Residual of a computed inverse: condition number times round-off, K terms a sum, K sums.
    bound = 8 * t.num_basis**2 * U * torch.linalg.cond(gram).item()
    torch.testing.assert_close(gram @ inverse, eye, rtol=0, atol=bound)
    assert bound < 1e-7


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
        (lambda s: 1.0, "to be a Tensor"),
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
    with pytest.raises(ValueError, match=r"whole numbers up to 299, got torch.uint8"):
        Discrete(300).sample(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"whole numbers up to 299, got torch.bfloat16"):
        (Line() * Discrete(300)).sample(3, dtype=torch.bfloat16)
    assert (Line() * Discrete(257)).sample(3, dtype=torch.bfloat16).shape == (3, 2)
