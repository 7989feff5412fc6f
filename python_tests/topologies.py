"""Topologies of every kind, and how the tests draw their conditions."""

import math
import re

import pytest
import torch

from neuromod_ext.topology import (
    Bezier,
    Custom,
    Cylinder,
    Discrete,
    Ellipse,
    Fourier,
    Line,
    PiecewiseLinear,
    Simplex,
    Sphere,
    Spline,
    Torus,
)

U = 2.0**-53  # unit round-off of float64


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
    def name(t):  # the same in every process
        return re.sub(r" at 0x\w+", "", repr(t))

    return pytest.mark.parametrize("t", topologies, ids=name)


def draw(t, n=64, seed=0):
    dtype = torch.float64 if t.sample(0).is_floating_point() else torch.int64
    return t.sample(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def onto_domain(t):
    """A smooth map from free numbers to conditions of t, for derivatives on a curved domain."""
    if isinstance(t, Sphere):
        return lambda v: v / v.norm(dim=-1, keepdim=True)
    return (lambda v: v.softmax(-1)) if isinstance(t, Simplex) else (lambda v: v)


def assert_moments(t, n=20_000):
    c = t(draw(t, n)).double()  # every sample lies in the domain
    mean, square = c.T @ c / n, c.square().T @ c.square() / n  # of the products c_j c_k
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    error = (mean - t.gram()).abs()
    assert (error <= 5 * deviation / math.sqrt(n) + n * U).all()  # five standard errors
