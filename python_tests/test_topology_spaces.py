"""Spheres, simplices, tasks and products against their definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from topologies import U, draw, named, rising

from neuromod_ext.topology import (
    Cylinder,
    Discrete,
    Ellipse,
    Line,
    Product,
    Simplex,
    Sphere,
    Spline,
    Torus,
)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@named([Sphere(), Simplex(5)])
def test_normalising_in_half_precision_is_good_enough(t, dtype):
    t(draw(t, n=1000).to(dtype))


def test_dtype_of_tasks():
    for dtype in (torch.int64, torch.int32, torch.uint8):
        c = Discrete(3)(torch.tensor([2, 0], dtype=dtype))
        assert c.dtype is torch.float32
        assert torch.equal(c, torch.eye(3)[[2, 0]])


def test_coefficients_never_alias_the_condition():
    s = torch.tensor([0.5, 0.5])
    Simplex(2)(s).zero_()
    assert s.tolist() == [0.5, 0.5]


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


def test_product_with_anything_else_is_a_type_error():
    with pytest.raises(TypeError, match="unsupported operand"):
        Line() * 2
