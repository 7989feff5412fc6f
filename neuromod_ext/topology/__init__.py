r"""Topologies: how a condition s becomes coefficients c(s), and the geometry that follows.

A weight manifold is :math:`W(s) = \sum_k c_k(s) P_k`. A topology fixes the functions c, the density
:math:`\rho` of the conditions, and with them the Gram matrix :math:`G = \int \rho\, c\, c^T ds`,
which says how far the whole manifold moves when its basis points :math:`P_k` do.

=============================  ==================  ================================  ============
topology                       condition s         c(s)                              K
=============================  ==================  ================================  ============
Line()                         [0, 1]              1 - s, s                          2
Bezier(degree)                 [0, 1]              Bernstein polynomials             degree + 1
PiecewiseLinear(n, closed)     [0, 1] or turns     hat functions, 2 non-zero         n
Spline(n, closed)              [0, 1] or turns     cubic B-splines, 4 non-zero       n
Ellipse()                      turns               1, cos 2πs, sin 2πs               3
Fourier(harmonics)             turns               1, cos 2πs, sin 2πs, cos 4πs, …   2H + 1
Sphere()                       unit vector, [3]    1, x, y, z                        4
Simplex(n)                     barycentric, [n]    s                                 n
Discrete(n, probabilities)     integer in [0, n)   one-hot                           n
Custom(function, num_basis)    any box             anything differentiable           num_basis
a * b, Product(factors)        those of a, of b    a ⊗ b                             K_a K_b
Torus(dims)                    turns, [dims]       product of ellipses               3 ** dims
Cylinder()                     turns and [0, 1]    Ellipse ⊗ Line                    6
=============================  ==================  ================================  ============

Conditions are uniform unless ``probabilities`` or ``with_density`` say otherwise. Line, ellipse,
basis points and metric are from Benjamin et al., "Walking the Weight Manifold", which also names
the torus; every other topology, and each unit and order of basis functions, is our choice.

**A condition out of its domain is never silently wrong.** A plain CPU tensor in eager mode raises
ValueError. Where values cannot be read, or only by stalling a device (``torch.compile``, export,
``torch.func`` transforms, CUDA, tensor subclasses), nothing is raised: exactly the offending
samples get NaN for their coefficients and gradients. Closed curves wrap every finite s.
"""

from neuromod_ext.topology.base import Product, Topology
from neuromod_ext.topology.curves import (
    Bezier,
    Custom,
    Ellipse,
    Fourier,
    Line,
    PiecewiseLinear,
    Spline,
)
from neuromod_ext.topology.spaces import Cylinder, Discrete, Simplex, Sphere, Torus

__all__ = [
    "Bezier",
    "Custom",
    "Cylinder",
    "Discrete",
    "Ellipse",
    "Fourier",
    "Line",
    "PiecewiseLinear",
    "Product",
    "Simplex",
    "Sphere",
    "Spline",
    "Topology",
    "Torus",
]
