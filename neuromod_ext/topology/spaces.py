"""Topologies of more dimensions than one, or of none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext.topology.base import Product, Topology
from neuromod_ext.topology.curves import Ellipse, Line
from neuromod_ext.topology.quadrature import Rule, equispaced, float64, gauss, grid


class Sphere(Topology):
    r"""Sphere S², degree 1; a condition is a unit vector (x, y, z).

    .. math:: c(s) = (1, x, y, z), \qquad G^{-1} = \mathrm{diag}(1, 3, 3, 3)

    A norm within the square root of the dtype's eps of 1 is accepted, and used as it is.
    """

    num_basis = 4
    condition_shape = (3,)
    _domain = "of unit norm"
    _remedy = "; divide it by its norm"

    def _valid(self, s: Tensor, eps: float) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(s, dim=-1)
        return (norm - 1).abs() <= math.sqrt(eps)

    def _coefficients(self, s: Tensor) -> Tensor:
        return F.pad(s, (1, 0), value=1.0)

    def _rule(self, points: int) -> Rule:
        points = max(2, points)
        nodes, weights = grid([gauss(points), equispaced(2 * points)])
        return self._from_square(nodes), weights

    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        return self._from_square(rand(n, 2))

    @staticmethod
    def _from_square(unit: Tensor) -> Tensor:
        """Map [n, 2] to [n, 3] and keep areas, as Archimedes did."""
        z, angle = 2 * unit[:, 0] - 1, 2 * math.pi * unit[:, 1]
        radius = (1 - z * z).sqrt()
        return torch.stack((radius * angle.cos(), radius * angle.sin(), z), -1)

    def _closed_form(self, inverse: bool) -> Tensor:
        return float64([1.0] + [3.0 if inverse else 1 / 3] * 3).diag()


class Simplex(Topology):
    r"""Simplex of n vertices; a condition holds its barycentric coordinates.

    .. math:: c(s) = s, \qquad G_{ij} = \frac{1 + \delta_{ij}}{n (n + 1)}, \qquad
        G^{-1}_{ij} = n ((n + 1)\, \delta_{ij} - 1)

    A coordinate may be -2 eps of the dtype; their sum may miss 1 by the square root of eps.

    Args:
        n: Number of vertices, at least 1.
    """

    _domain = "nonnegative and summing to 1"
    _remedy = "; apply softmax, or divide it by its sum"
    n: int

    def __init__(self, n: int) -> None:
        n = self._count("n", n, 1)
        self._set(n=n, num_basis=n, condition_shape=(n,))

    def _valid(self, s: Tensor, eps: float) -> Tensor:
        return (s >= -2 * eps).all(-1) & ((s.sum(-1) - 1).abs() <= math.sqrt(eps))

    def _coefficients(self, s: Tensor) -> Tensor:
        return s.clone()

    def _rule(self, points: int) -> Rule:
        n = self.n
        if points == 0 or n == 1:  # n nodes of degree 2, each between the centre and a vertex
            pull = 1 / math.sqrt(n + 1)
            nodes = (1 - pull) / n + pull * torch.eye(n, dtype=torch.float64, device="cpu")
            return nodes, torch.full_like(nodes[0], 1 / n)
        cube, weights = grid([gauss(points)] * (n - 1))
        rest = F.pad((1 - cube).cumprod(-1), (1, 0), value=1.0)  # what is left of a broken stick
        weights = weights * rest[:, :-1].prod(-1)
        return rest * F.pad(cube, (0, 1), value=1.0), weights / weights.sum()

    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        cuts = F.pad(rand(n, self.n - 1).sort(-1).values, (0, 1), value=1.0)
        return cuts.diff(dim=-1, prepend=torch.zeros_like(cuts[:, :1]))

    def _closed_form(self, inverse: bool) -> Tensor:
        n, eye = self.n, torch.eye(self.n, dtype=torch.float64, device="cpu")
        return n * ((n + 1) * eye - 1) if inverse else (1 + eye) / (n * (n + 1))


class Discrete(Topology):
    r"""n separate tasks; a condition is the number of one.

    .. math:: c_k(s) = \delta_{ks}, \qquad G^{-1} = \mathrm{diag}(1 / \rho)

    s has an integer dtype; beside other factors in a product it is a whole number.

    Args:
        n: Number of tasks, at least 1.
        probabilities: rho, n positive numbers that sum to 1 within 1e-6; None for uniform.
    """

    _integer = True
    n: int
    probabilities: tuple[float, ...] | None

    def __init__(self, n: int, probabilities: Iterable[float] | None = None) -> None:
        n = self._count("n", n, 1)
        rho = None if probabilities is None else tuple(map(float, probabilities))
        p = (1 / n,) * n if rho is None else rho
        if not (len(p) == n and min(p) > 0 and abs(sum(p) - 1) <= 1e-6):
            raise ValueError(f"Discrete: expected {n} probabilities > 0 summing to 1, got {rho}")
        self._set(n=n, num_basis=n, probabilities=rho, _domain=f"an integer in [0, {n})")

    @property
    def _largest(self) -> int:
        return self.n - 1

    def _valid(self, s: Tensor, eps: float) -> Tensor:
        inside = (s >= 0) & (s < self.n)
        return inside & (s == s.floor()) if s.is_floating_point() else inside

    def _coefficients(self, s: Tensor) -> Tensor:
        task = torch.arange(self.n, device=s.device)
        return (s.unsqueeze(-1) == task).to(s.dtype if s.is_floating_point() else torch.float32)

    def _rule(self, points: int) -> Rule:
        rho = float64(self.probabilities or [1.0] * self.n)
        return torch.arange(self.n, device="cpu"), rho / rho.sum()

    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        u = rand(n)
        return torch.searchsorted(self._rule(0)[1].cumsum(0)[:-1].to(u), u, right=True)

    def _closed_form(self, inverse: bool) -> Tensor:
        rho = self._rule(0)[1]
        return (rho.reciprocal() if inverse else rho).diag()


class Torus(Product):
    """Product of ellipses; a condition is one phase in turns for each, [dims].

    Args:
        dims: Number of ellipses, at least 1.
    """

    dims: int

    def __init__(self, dims: int = 2) -> None:
        super().__init__([Ellipse()] * self._count("dims", dims, 1))
        self._set(dims=dims)


class Cylinder(Product):
    """``Ellipse() * Line()``; a condition is a phase in turns and a height in [0, 1]."""

    def __init__(self) -> None:
        super().__init__((Ellipse(), Line()))
