"""What a topology is, and the product of several."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, reduce
from typing import Any, NoReturn

import torch
from torch import Tensor

from neuromod_ext._transforms import transform_active
from neuromod_ext.topology.quadrature import Rule, columns, grid

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

    @property
    def _largest(self) -> int:
        """The largest whole number that a condition must be told from the one below by."""
        return 0

    @property
    def num_local(self) -> int:
        """L <= K, how many basis points act at one condition."""
        return self.num_basis

    def _local(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first basis point that acts at s, [*batch], and the values, [*batch, L]."""
        c = self._coefficients(s)
        return torch.zeros_like(c[..., 0], dtype=torch.int64), c

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
        s, factor = self._checked(s)
        c = self._coefficients(s)
        return c if factor is None else c * factor.to(c.dtype)

    def local(self, s: Tensor | float | Sequence[Any]) -> tuple[Tensor, Tensor]:
        r"""Map conditions to those coefficients that may be other than zero.

        .. math:: c_k(s) = \sum_l c^\mathrm{local}_l(s)\, [k = (i(s) + l) \bmod K]

        They are consecutive round the basis points, ``num_local`` of them; on a topology without
        local support, all. Differentiable as :meth:`__call__` is.

        Args:
            s: As there.

        Returns:
            The basis point of the first one, i, [*batch], int64, and the coefficients, [*batch, L].

        Raises:
            TypeError: As there.
            ValueError: As there.
        """
        s, factor = self._checked(s)
        index, c = self._local(s)
        if factor is None:
            return index, c
        return torch.where(factor.isnan().squeeze(-1), 0, index), c * factor.to(c.dtype)

    def _checked(self, s: Tensor | float | Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """Conditions as they enter the formulas; what to multiply coefficients by, if not 1.

        That is NaN for conditions out of the domain whose values may not be read.
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
            return s, torch.where(valid, 1.0, math.nan).unsqueeze(-1)
        if not valid.all():
            index = tuple((~valid).nonzero()[0].tolist())
            where = f" at index {index[0] if len(index) == 1 else index}" if index else ""
            got = f"{s.detach()[index].tolist()}{where}{self._remedy}"
            raise ValueError(f"{name}: expected s {self._domain}, got {got}")
        return s, None

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
            ValueError: G is numerically singular: its condition number exceeds 1e12 (that of a
                closed form in the 1-norm).
        """
        return self._inverse.clone()

    @cached_property
    def _inverse(self) -> Tensor:
        exact = self._closed_form(inverse=True) if self.density is None else None
        gram = self.gram()
        if exact is not None:
            norms = [matrix.abs().sum(0).max() for matrix in (gram, exact)]
            if not norms[0] * norms[1] < _MAX_CONDITION:
                self._refuse_gram(f"{norms[0] * norms[1]:.1e}")
            return exact
        low, high = torch.linalg.eigvalsh(gram)[[0, -1]].tolist()
        if not low * _MAX_CONDITION > high:
            self._refuse_gram(f"eigenvalues from {low:.1e} to {high:.1e}")
        return torch.cholesky_inverse(torch.linalg.cholesky(gram)).contiguous()  # as kron needs

    def _refuse_gram(self, got: str) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__}: expected a Gram matrix of condition number below "
            f"{_MAX_CONDITION:g}, got {got}; "
            "use fewer basis functions, or add damping to gram() and invert that"
        )

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
            ValueError: n is negative, or there are more tasks than dtype tells apart.
        """
        dtype = dtype or (torch.int64 if self._integer else torch.get_default_dtype())
        real = dtype.is_floating_point
        if real == self._integer or dtype.is_complex or dtype is torch.bool:
            kind = "an integer" if self._integer else "a floating"
            raise TypeError(f"{type(self).__name__}: expected {kind} dtype, got {dtype}")
        exact = 2 / torch.finfo(dtype).eps if real else torch.iinfo(dtype).max
        if self._largest > exact:
            raise ValueError(
                f"{type(self).__name__}: expected a dtype that holds whole numbers up to "
                f"{self._largest}, got {dtype}"
            )
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
        factors: list[Topology] = []
        for t in (self, other):  # flatten, but a density joins the factors it was given for
            factors += t.factors if isinstance(t, Product) and t.density is None else (t,)
        return Product(factors)

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
        if not isinstance(value, Tensor):
            name, got = type(self).__name__, type(value).__name__
            raise ValueError(f"{name}: expected density(s) to be a Tensor, got {got}")
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

    @cached_property
    def _key(self) -> tuple[object, ...]:
        return type(self), *self._arguments().items(), self.density

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: {name} cannot be assigned")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(type(self), **self._arguments())
        return make, (), {"density": self.density}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        density = "" if self.density is None else f".with_density({self.density!r})"
        return f"{type(self).__name__}({arguments}){density}"


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
        return grid([factor._weighted_rule(points) for factor in self.factors])

    def _draw(self, n: int, rand: Callable[..., Tensor]) -> Tensor:
        return torch.cat([columns(f._weighted_draw(n, rand)) for f in self.factors], -1)

    @property
    def _largest(self) -> int:
        return max(factor._largest for factor in self.factors)

    def _closed_form(self, inverse: bool) -> Tensor:
        return reduce(torch.kron, [f._inverse if inverse else f.gram() for f in self.factors])

    def constant(self) -> Tensor:
        """Return the product of the factors' constants, see :meth:`Topology.constant`."""
        return reduce(torch.kron, [factor.constant() for factor in self.factors])


def _readable(s: Tensor) -> bool:
    """Tell whether the values of s can be read here and now, without waiting for a device."""
    return not (
        torch.compiler.is_compiling()
        or s.device.type != "cpu"
        or type(s) not in (Tensor, torch.nn.Parameter)
        or transform_active()
    )
