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

from __future__ import annotations

import copy
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Rule = tuple[Tensor, Tensor]  # quadrature nodes and weights
_MAX_CONDITION = 1e12  # beyond it an inverse Gram matrix keeps fewer than four digits


class Topology(ABC):
    r"""The map c(s) from a condition to coefficients, and its Gram matrix.

    .. math:: W(s) = \sum_k c_k(s) P_k, \qquad G = \int \rho(s)\, c(s)\, c(s)^T ds

    Topologies are immutable values: equal, hashable and picklable by their constructor's arguments
    and density (functions compare by identity). Every matrix they return is float64 on the CPU.

    Attributes:
        num_basis: K, the number of basis points.
        condition_shape: Trailing shape of one condition: ``()`` for a scalar, ``(d,)`` otherwise.
        density: What ``with_density`` was given, or None.
    """

    num_basis: int
    condition_shape: tuple[int, ...] = ()
    density: Callable[[Tensor], Tensor] | None = None
    _domain: str  # what s must be, in the words of the error
    _remedy = ""
    _integer = False  # whether conditions have an integer dtype

    @abstractmethod
    def _valid(self, s: Tensor, eps: float) -> Tensor:
        """Tell, as bool [*batch], which conditions are in the domain up to rounding at eps."""

    @abstractmethod
    def _coefficients(self, s: Tensor) -> Tensor:
        """Return c(s), [*batch, K], by differentiable operations that read no value."""

    @abstractmethod
    def _rule(self, points: int) -> Rule:
        """Return a rule exact for c c^T, of about ``points`` or more nodes along each dimension."""

    @abstractmethod
    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        """Make n conditions of uniform numbers rand(*shape)."""

    def _closed_form(self, inverse: bool) -> Tensor | None:
        """Return G or its inverse, where a closed form is known."""
        return None

    def __call__(self, s: Tensor | float | Sequence[Any]) -> Tensor:
        """Map conditions to coefficients.

        Differentiable in s, in forward and reverse mode and to any order where the basis is smooth;
        the derivative at a knot is that of the segment on its right.

        Args:
            s: Conditions, [*batch, *condition_shape], or a Python number or sequence.

        Returns:
            c, [*batch, K], float64 for float64 conditions and float32 for all others.

        Raises:
            TypeError: s is bool or complex, or floating where the topology expects integers.
            ValueError: Wrong trailing shape, or a condition out of the domain (see the module).
        """
        name, shape = type(self).__name__, self.condition_shape
        if not isinstance(s, Tensor):
            s = torch.as_tensor(s)
        if s.dtype is torch.bool or s.is_complex() or (self._integer and s.is_floating_point()):
            kind = "an integer" if self._integer else "a real"
            raise TypeError(f"{name}: expected s of {kind} dtype, got {s.dtype}")
        if s.shape[max(0, s.ndim - len(shape)) :] != shape:
            raise ValueError(f"{name}: expected s of shape [*, {shape[0]}], got {list(s.shape)}")
        eps = torch.finfo(s.dtype if s.is_floating_point() else torch.float32).eps
        if self._integer or s.dtype not in (torch.float32, torch.float64):
            s = s.long() if self._integer else s.float()
        valid = self._valid(s, eps)
        if not _readable(s):
            c = self._coefficients(s)
            return c * torch.where(valid, 1.0, math.nan).to(c.dtype).unsqueeze(-1)
        if not valid.all():
            index = tuple((~valid).nonzero()[0].tolist())
            where = f" at index {index[0] if len(index) == 1 else index}" if index else ""
            got = f"{s.detach()[index].tolist()}{where}{self._remedy}"
            raise ValueError(f"{name}: expected s {self._domain}, got {got}")
        return self._coefficients(s)

    @torch.no_grad()
    def gram(self) -> Tensor:
        """Return the Gram matrix G, [K, K], in closed form or else by ``quadrature``."""
        exact = self._closed_form(inverse=False) if self.density is None else None
        if exact is not None:
            return exact
        nodes, weights = self.quadrature()
        c = self._coefficients(nodes).double()
        return c.T @ (weights.unsqueeze(-1) * c)

    def gram_inverse(self) -> Tensor:
        """Return the inverse of G, [K, K], in closed form or else by Cholesky; computed once.

        Raises:
            ValueError: G is numerically singular: its condition number exceeds 1e12.
        """
        return self._inverse.clone()

    @cached_property
    def _inverse(self) -> Tensor:
        exact = self._closed_form(inverse=True) if self.density is None else None
        if exact is not None:
            return exact
        gram = self.gram()
        low, high = torch.linalg.eigvalsh(gram)[[0, -1]].tolist()
        if not low * _MAX_CONDITION > high:
            raise ValueError(
                f"{type(self).__name__}: expected a Gram matrix of condition number below "
                f"{_MAX_CONDITION:g}, got eigenvalues from {low:.1e} to {high:.1e}; "
                "use fewer basis functions, or add damping to gram() and invert that"
            )
        return torch.cholesky_inverse(torch.linalg.cholesky(gram)).contiguous()  # as kron needs

    @torch.no_grad()
    def constant(self) -> Tensor:
        r"""Return the a, [K], with :math:`\sum_k c_k(s) a_k = 1` for every s.

        .. math:: a = G^{-1} \int \rho\, c\, ds

        Raises:
            ValueError: The constant function is not in the span of c.
        """
        nodes, weights = self._rule(0)
        c, root = self._coefficients(nodes).double(), weights.sqrt().unsqueeze(-1)
        a: Tensor = torch.linalg.lstsq(root * c, root).solution.squeeze(-1)
        for solution in (a.round() + 0.0, a):  # whole numbers, the usual case, are exact
            residual = float((c @ solution - 1).abs().max())
            if residual < 1e-9:
                return solution
        raise ValueError(
            f"{type(self).__name__}: expected the constant function in the span of c(s), "
            f"got a residual of {residual:.1e}; add the basis function 1"
        )

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw n conditions from rho, [n, *condition_shape].

        By default in torch's default dtype (``Discrete``: int64), on the generator's device.

        Raises:
            TypeError: dtype is not floating (``Discrete``: not an integer dtype).
            ValueError: n is negative.
        """
        dtype = dtype or (torch.int64 if self._integer else torch.get_default_dtype())
        real = dtype.is_floating_point
        if real == self._integer or dtype.is_complex or dtype is torch.bool:
            kind = "an integer" if self._integer else "a floating"
            raise TypeError(f"{type(self).__name__}: expected {kind} dtype, got {dtype}")
        wide = torch.float32 if dtype.itemsize <= 4 else torch.float64
        device = device or (generator.device if generator else None)
        rand = functools.partial(torch.rand, generator=generator, dtype=wide, device=device)
        return self._weighted_draw(self._count("n", n, 0), rand).to(dtype)

    def quadrature(self) -> Rule:
        """Return a quadrature rule for rho, exact for polynomial and trigonometric c c^T.

        Returns:
            Nodes, float64 [n, *condition_shape] (``Discrete``: int64), and weights, float64 [n],
            that sum to 1.
        """
        return self._weighted_rule(0)

    def with_density(self, density: Callable[[Tensor], Tensor]) -> Topology:
        r"""Return the same c(s) with conditions of another density.

        .. math:: \rho'(s) \propto \mathrm{density}(s)\, \rho(s)

        G is by quadrature, with :math:`\min(128, 2^{14/d})` nodes along each of d <= 7 dimensions.
        ``sample`` draws from rho and rejects against the largest density of all nodes and draws so
        far, beginning anew when that grows; it reads values, so it waits for the device.

        Args:
            density: s [n, *condition_shape] to n finite values >= 0, not necessarily normalised; it
                replaces an earlier one.

        Raises:
            ValueError: The values are not as described, or vanish at every node.
        """
        other = copy.copy(self)
        other._set(density=density)
        other.quadrature()
        return other

    def __mul__(self, other: Topology) -> Topology:
        """Return the product topology, see :class:`Product`."""
        if not isinstance(other, Topology):
            return NotImplemented
        return Product(self._factors() + other._factors())

    def _factors(self) -> tuple[Topology, ...]:
        return (self,)

    def _fine_points(self) -> int:
        dims = math.prod(self.condition_shape)
        if dims > 7:
            name = type(self).__name__
            raise ValueError(f"{name}: expected at most 7 dimensions to integrate, got {dims}")
        return min(128, int(2 ** (14 / dims)))

    def _weighted_rule(self, points: int) -> Rule:
        if self.density is None:
            return self._rule(points)
        nodes, weights = self._rule(max(points, self._fine_points()))
        weights = weights * self._density_at(nodes)
        if not weights.sum() > 0:
            raise ValueError(f"{type(self).__name__}: expected density(s) > 0 somewhere, got 0")
        return nodes, weights / weights.sum()

    def _weighted_draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        if self.density is None:
            return self._draw(n, rand)
        bound = self._density_at(self._rule(self._fine_points())[0]).max().item()
        kept = self._draw(0, rand)
        while len(kept) < n:
            s = self._draw(max(n, 1024), rand)
            value = self._density_at(s)
            if value.max() > bound:
                bound, kept = value.max().item(), kept[:0]
            kept = torch.cat((kept, s[rand(len(s)) * bound < value]))
        return kept[:n]

    def _density_at(self, s: Tensor) -> Tensor:
        assert self.density is not None
        with torch.no_grad():
            value = self.density(s)
        if value.shape != s.shape[:1] or not ((value >= 0) & value.isfinite()).all():
            expected = f"density(s) of shape [{len(s)}], finite and >= 0"
            got = f"shape {list(value.shape)} and {value.min()} to {value.max()}"
            raise ValueError(f"{type(self).__name__}: expected {expected}, got {got}")
        return value

    def _count(self, name: str, value: int, least: int) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{type(self).__name__}: expected an integer {name}, got {value!r}")
        if value < least:
            raise ValueError(f"{type(self).__name__}: expected {name} >= {least}, got {value}")
        return value.__index__()

    # An immutable value: every constructor argument is stored under its own name.

    def _set(self, **attributes: object) -> None:
        vars(self).update(attributes)

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def _key(self) -> tuple[object, ...]:
        return type(self), *self._arguments().items(), self.density

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: {name} cannot be assigned")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(type(self), **self._arguments())
        return make, (), {"density": self.density}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        density = "" if self.density is None else f".with_density({self.density!r})"
        return f"{type(self).__name__}({arguments}){density}"


class _Box(Topology):
    """Conditions in a box, uniformly; its sides are open, or closed: they wrap."""

    closed: bool
    domain: tuple[tuple[float, float], ...] = ((0.0, 1.0),)

    @property
    def _domain(self) -> str:  # type: ignore[override]
        box = " x ".join(f"[{low:g}, {high:g}]" for low, high in self.domain)
        return "finite" if self.closed else f"in {box}"

    @property
    def _remedy(self) -> str:  # type: ignore[override]
        return "" if self.closed else "; clamp it or use a closed topology"

    def _each(self, function: Callable[[Tensor, float, float], Tensor], s: Tensor) -> Tensor:
        """Apply function(s, low, high) to each side."""
        if not self.condition_shape:
            return function(s, *self.domain[0])
        sides = zip(s.unbind(-1), self.domain, strict=True)
        return torch.stack([function(x, low, high) for x, (low, high) in sides], -1)

    def _valid(self, s: Tensor, eps: float) -> Tensor:
        def inside(x: Tensor, low: float, high: float) -> Tensor:
            slack = 2 * eps * max(abs(low), abs(high))
            return x.isfinite() if self.closed else (x >= low - slack) & (x <= high + slack)

        valid = self._each(inside, s)
        return valid.all(-1) if self.condition_shape else valid

    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        return self._each(_stretch, rand(n, *self.condition_shape))


class Fourier(_Box):
    r"""Closed curve made of the first harmonics.

    .. math:: c(s) = (1, \cos 2\pi s, \sin 2\pi s, \dots, \cos 2\pi H s, \sin 2\pi H s), \qquad
        G^{-1} = \mathrm{diag}(1, 2, 2, \dots)

    s is in turns, reduced modulo 1 before the trigonometry: a large s loses no precision.

    Args:
        harmonics: H, at least 1.
    """

    closed = True
    harmonics: int

    def __init__(self, harmonics: int) -> None:
        harmonics = self._count("harmonics", harmonics, 1)
        self._set(harmonics=harmonics, num_basis=2 * harmonics + 1)

    def _coefficients(self, s: Tensor) -> Tensor:
        harmonic = torch.arange(1, self.harmonics + 1, dtype=s.dtype, device=s.device)
        angle = 2 * math.pi * (s - s.floor()).unsqueeze(-1) * harmonic
        waves = torch.stack((angle.cos(), angle.sin()), -1).flatten(-2)
        return F.pad(waves, (1, 0), value=1.0)

    def _rule(self, points: int) -> Rule:
        return _equispaced(max(self.num_basis, points))

    def _closed_form(self, inverse: bool) -> Tensor:
        return _float64([1.0] + [2.0 if inverse else 0.5] * (self.num_basis - 1)).diag()


class Ellipse(Fourier):
    r"""Closed curve, an ellipse about :math:`P_0` spanned by :math:`P_1` and :math:`P_2`.

    .. math:: c(s) = (1, \cos 2\pi s, \sin 2\pi s), \qquad G^{-1} = \mathrm{diag}(1, 2, 2)

    s is in turns and wraps.
    """

    def __init__(self) -> None:
        super().__init__(1)


class _BSpline(_Box):
    """Uniform B-spline: clamped where open, so it meets its end points; periodic where closed."""

    degree: int

    def __init__(self, n: int, closed: bool = False) -> None:
        n = self._count("n", n, self.degree + 1)
        self._set(n=n, closed=bool(closed), num_basis=n)

    @property
    def _segments(self) -> int:
        return self.num_basis if self.closed else self.num_basis - self.degree

    def _local(self, s: Tensor) -> Rule:
        """Return which basis functions act at s, and their values: [*batch, degree + 1] each."""
        t = (s - s.floor() if self.closed else s).unsqueeze(-1) * self._segments
        segment = t.floor() if self.closed else t.floor().clamp(0, self._segments - 1)
        step = torch.arange(self.degree + 1, dtype=s.dtype, device=s.device)
        c = torch.ones_like(t)
        for degree in range(1, self.degree + 1):  # Cox-de Boor, over all functions at once
            high = segment + step[1 : degree + 1]
            low = high - degree
            if not self.closed:
                low, high = low.clamp(min=0), high.clamp(max=self._segments)
            c = c / (high - low)
            c = F.pad((high - t) * c, (0, 1)) + F.pad((t - low) * c, (1, 0))
        # A closed curve is centred: basis point k acts most at s = k / n.
        index = segment + step - ((self.degree - 1) // 2 if self.closed else 0)
        return index.remainder(self.num_basis), c

    def _coefficients(self, s: Tensor) -> Tensor:
        index, c = self._local(s)
        basis = torch.arange(self.num_basis, dtype=s.dtype, device=s.device)
        return (c.unsqueeze(-1) * (index.unsqueeze(-1) == basis)).sum(-2)

    def _rule(self, points: int) -> Rule:
        segments = self._segments
        nodes, weights = _gauss(max(self.degree + 1, points // segments))
        start = torch.arange(segments, dtype=torch.float64, device="cpu").unsqueeze(-1)
        return ((start + nodes) / segments).flatten(), weights.repeat(segments) / segments


class PiecewiseLinear(_BSpline):
    r"""Straight segments through n equally spaced basis points, of which two act at a time.

    .. math:: c_k(s) = \max(0, 1 - |t - k|), \qquad t = (n - 1) s \ \text{or closed} \ t = n s

    Open, s in [0, 1] runs from point 0 to point n - 1. Closed, s is in turns and wraps, and
    :math:`|t - k|` is the distance round the circle.

    Args:
        n: Number of basis points, at least 2.
        closed: Whether the last point joins the first.
    """

    degree = 1


class Spline(_BSpline):
    r"""Uniform cubic B-spline of n control points, of which four act at a time.

    .. math:: c_k(s) = N_{k,3}(t), \qquad t = (n - 3) s \ \text{or closed} \ t = n s

    Twice continuously differentiable. Open, it is clamped: s in [0, 1] runs from point 0 to point
    n - 1. Closed, it is periodic: s is in turns and wraps, and point k acts most at s = k / n.

    Args:
        n: Number of control points, at least 4.
        closed: Whether the curve is periodic.
    """

    degree = 3


class Bezier(_BSpline):
    r"""Open curve of Bernstein polynomials.

    .. math:: c_k(s) = \binom{n}{k} s^k (1 - s)^{n - k}, \qquad
        G_{ij} = \frac{\binom{n}{i} \binom{n}{j}}{(2n + 1) \binom{2n}{i + j}}

    s is in [0, 1]. :math:`G^{-1}` holds the coefficients of the dual Bernstein polynomials
    (Jüttler 1998), summed in integers: each entry is correctly rounded.

    Args:
        degree: n, at least 1.
    """

    closed = False

    def __init__(self, degree: int) -> None:
        degree = self._count("degree", degree, 1)
        self._set(degree=degree, num_basis=degree + 1)

    def _coefficients(self, s: Tensor) -> Tensor:
        s = s.unsqueeze(-1)
        c = torch.ones_like(s)
        for _ in range(self.degree):  # times (1 - s) + s z, as polynomials in z
            c = F.pad(c * (1 - s), (0, 1)) + F.pad(c * s, (1, 0))
        return c

    def _closed_form(self, inverse: bool) -> Tensor:
        n, comb = self.degree, math.comb

        def gram(i: int, j: int) -> float:
            return comb(n, i) * comb(n, j) / ((2 * n + 1) * comb(2 * n, i + j))

        def half(i: int, m: int) -> int:
            return comb(n + m + 1, n - i) * comb(n - m, n - i)

        def dual(i: int, j: int) -> float:
            total = sum((2 * m + 1) * half(i, m) * half(j, m) for m in range(min(i, j) + 1))
            return (1 - (i + j) % 2 * 2) * total / (comb(n, i) * comb(n, j))

        entry = dual if inverse else gram
        return _float64([[entry(i, j) for j in range(n + 1)] for i in range(n + 1)])


class Line(Bezier):
    r"""Straight line from :math:`P_0` at s = 0 to :math:`P_1` at s = 1.

    .. math:: c(s) = (1 - s, s), \qquad G^{-1} = \begin{pmatrix} 4 & -2 \\ -2 & 4 \end{pmatrix}

    s is in [0, 1].
    """

    def __init__(self) -> None:
        super().__init__(1)


class Custom(_Box):
    r"""Any differentiable c(s) on a box, with conditions uniform in it.

    .. math:: G = \int \rho\, c\, c^T ds \approx \sum_i w_i\, c(s_i)\, c(s_i)^T

    G is by quadrature with :math:`\min(128, 2^{14/d})` nodes along each of d <= 7 dimensions,
    Gauss-Legendre where open and equispaced where closed.

    Args:
        function: s [*batch, *condition_shape] to c [*batch, K], sample by sample, in torch.
        num_basis: K, at least 1.
        condition_shape: ``()`` or ``(d,)``.
        domain: (low, high) for every dimension, or one such pair for each.
        closed: Whether every dimension wraps; ``function`` then sees s reduced to [low, high].
    """

    function: Callable[[Tensor], Tensor]

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        num_basis: int,
        condition_shape: Sequence[int] = (),
        domain: Sequence[float] | Sequence[Sequence[float]] = (0.0, 1.0),
        closed: bool = False,
    ) -> None:
        if not callable(function):
            raise TypeError(f"Custom: expected a callable function, got {function!r}")
        shape = tuple(self._count("condition_shape", size, 1) for size in condition_shape)
        if len(shape) > 1:
            raise ValueError(f"Custom: expected condition_shape () or (d,), got {shape}")
        box, sides = np.asarray(domain, dtype=float), (math.prod(shape), 2)
        fits = box.shape in ((2,), sides) and np.isfinite(box).all() and (np.diff(box) > 0).all()
        if not fits:
            raise ValueError(f"Custom: expected domain (low, high) with low < high, got {domain}")
        self._set(
            function=function,
            num_basis=self._count("num_basis", num_basis, 1),
            condition_shape=shape,
            domain=tuple(map(tuple, np.broadcast_to(box, sides).tolist())),
            closed=bool(closed),
        )

    def _coefficients(self, s: Tensor) -> Tensor:
        expected = [*s.shape[: s.ndim - len(self.condition_shape)], self.num_basis]
        c = self.function(self._each(_wrap, s) if self.closed else s)
        if (got := list(c.shape)) != expected:
            raise ValueError(f"Custom: expected function(s) of shape {expected}, got {got}")
        return c.to(s.dtype)

    def _rule(self, points: int) -> Rule:
        points = max(points, self._fine_points())
        side = _equispaced(points) if self.closed else _gauss(points)
        nodes, weights = _grid([side] * len(self.domain))
        return self._each(_stretch, nodes if self.condition_shape else nodes.squeeze(-1)), weights


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
        nodes, weights = _grid([_gauss(points), _equispaced(2 * points)])
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
        return _float64([1.0] + [3.0 if inverse else 1 / 3] * 3).diag()


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
        cube, weights = _grid([_gauss(points)] * (n - 1))
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

    def _valid(self, s: Tensor, eps: float) -> Tensor:
        return (s >= 0) & (s < self.n) & (s == s.floor())

    def _coefficients(self, s: Tensor) -> Tensor:
        task = torch.arange(self.n, device=s.device)
        return (s.unsqueeze(-1) == task).to(s.dtype if s.is_floating_point() else torch.float32)

    def _rule(self, points: int) -> Rule:
        rho = _float64(self.probabilities or [1.0] * self.n)
        return torch.arange(self.n, device="cpu"), rho / rho.sum()

    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        u = rand(n)
        return torch.searchsorted(self._rule(0)[1].cumsum(0)[:-1].to(u), u, right=True)

    def _closed_form(self, inverse: bool) -> Tensor:
        rho = self._rule(0)[1]
        return (rho.reciprocal() if inverse else rho).diag()


class Product(Topology):
    r"""Product of independent topologies; ``a * b`` is the short form.

    .. math:: c(s_1, s_2) = c^1(s_1) \otimes c^2(s_2), \qquad G^{-1} = G_1^{-1} \otimes G_2^{-1}

    Basis point :math:`k_1 K_2 + k_2` belongs to :math:`c^1_{k_1} c^2_{k_2}`. Conditions are
    concatenated along the last dimension, where a scalar counts as 1.

    Args:
        factors: The topologies, at least one.
    """

    factors: tuple[Topology, ...]

    def __init__(self, factors: Iterable[Topology]) -> None:
        factors = tuple(factors)
        if not factors or not all(isinstance(factor, Topology) for factor in factors):
            raise TypeError(f"Product: expected one or more topologies, got {factors}")
        self._set(
            factors=factors,
            num_basis=math.prod(factor.num_basis for factor in factors),
            condition_shape=(sum(math.prod(factor.condition_shape) for factor in factors),),
            _domain=f"({', '.join(factor._domain for factor in factors)})",
            _integer=all(factor._integer for factor in factors),
        )

    def _factors(self) -> tuple[Topology, ...]:
        return self.factors if self.density is None else (self,)

    def _parts(self, s: Tensor) -> list[tuple[Topology, Tensor]]:
        """Each factor with its part of the conditions."""
        widths = [math.prod(factor.condition_shape) for factor in self.factors]
        parts = zip(self.factors, torch.split(s, widths, -1), strict=True)
        return [(f, part if f.condition_shape else part.squeeze(-1)) for f, part in parts]

    def _valid(self, s: Tensor, eps: float) -> Tensor:
        return reduce(torch.logical_and, [f._valid(part, eps) for f, part in self._parts(s)])

    def _coefficients(self, s: Tensor) -> Tensor:
        def outer(a: Tensor, b: Tensor) -> Tensor:
            return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)

        return reduce(outer, [f._coefficients(part) for f, part in self._parts(s)])

    def _rule(self, points: int) -> Rule:
        return _grid([factor._weighted_rule(points) for factor in self.factors])

    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        return torch.cat([_columns(f._weighted_draw(n, rand)) for f in self.factors], -1)

    def _closed_form(self, inverse: bool) -> Tensor:
        return reduce(torch.kron, [f._inverse if inverse else f.gram() for f in self.factors])

    def constant(self) -> Tensor:
        """Return the product of the factors' constants, see :meth:`Topology.constant`."""
        return reduce(torch.kron, [factor.constant() for factor in self.factors])


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


def _readable(s: Tensor) -> bool:
    """Tell whether the values of s can be read here and now, without waiting for a device."""
    return not (
        torch.compiler.is_compiling()
        or s.device.type != "cpu"
        or type(s) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _stretch(unit: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * unit


def _wrap(s: Tensor, low: float, high: float) -> Tensor:
    turns = (s - low) / (high - low)
    return _stretch(turns - turns.floor(), low, high)


def _float64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _columns(nodes: Tensor) -> Tensor:
    return nodes.unsqueeze(-1) if nodes.ndim == 1 else nodes


def _gauss(n: int) -> Rule:
    """Return Gauss-Legendre on [0, 1], exact for polynomials of degree 2n - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((1 + nodes) / 2), torch.from_numpy(weights / 2)


def _equispaced(n: int) -> Rule:
    """Return equal steps round the circle, exact for harmonics below n."""
    nodes = torch.arange(n, dtype=torch.float64, device="cpu") / n
    return nodes, torch.full_like(nodes, 1 / n)


def _grid(rules: Sequence[Rule]) -> Rule:
    """Return all combinations of nodes, [n, d], with the products of their weights."""
    nodes, weights = _columns(rules[0][0]), rules[0][1]
    for x, w in rules[1:]:
        pair = nodes.repeat_interleave(len(x), 0), _columns(x).repeat(len(nodes), 1)
        nodes = torch.cat(pair, -1)
        weights = torch.kron(weights, w)
    return nodes, weights
