"""Curves, open and closed, and boxes in general."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext.topology.base import Topology
from neuromod_ext.topology.quadrature import Rule, equispaced, float64, gauss, grid


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
        return equispaced(max(self.num_basis, points))

    def _closed_form(self, inverse: bool) -> Tensor:
        return float64([1.0] + [2.0 if inverse else 0.5] * (self.num_basis - 1)).diag()


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

    @property
    def num_local(self) -> int:
        return self.degree + 1

    def _local(self, s: Tensor) -> tuple[Tensor, Tensor]:
        first, c = self._acting(s)
        return first.remainder(self.num_basis).long(), c

    def _acting(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first function that acts at s, a whole number, and the values of all."""
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
        return segment.squeeze(-1) - ((self.degree - 1) // 2 if self.closed else 0), c

    def _coefficients(self, s: Tensor) -> Tensor:
        first, c = self._acting(s)
        step = torch.arange(self.num_local, dtype=s.dtype, device=s.device)
        index = (first.unsqueeze(-1) + step).remainder(self.num_basis)
        basis = torch.arange(self.num_basis, dtype=s.dtype, device=s.device)
        return (c.unsqueeze(-1) * (index.unsqueeze(-1) == basis)).sum(-2)

    def _rule(self, points: int) -> Rule:
        segments = self._segments
        nodes, weights = gauss(max(self.degree + 1, points // segments))
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

    def _local(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return Topology._local(self, s)

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
        return float64([[entry(i, j) for j in range(n + 1)] for i in range(n + 1)])


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
        side = equispaced(points) if self.closed else gauss(points)
        nodes, weights = grid([side] * len(self.domain))
        return self._each(_stretch, nodes if self.condition_shape else nodes.squeeze(-1)), weights


def _stretch(unit: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * unit


def _wrap(s: Tensor, low: float, high: float) -> Tensor:
    turns = (s - low) / (high - low)
    return _stretch(turns - turns.floor(), low, high)
