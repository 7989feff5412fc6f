"""What every modulator is: a fixed, invertible linear map of a vector of weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from neuromod_ext._checks import FLOATING, accumulation_dtype
from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch.vector import copied, write

Self = TypeVar("Self", bound="Modulator")


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def condition_limit(dtype: torch.dtype) -> float:
    r"""The largest condition number of a modulator for weights of a dtype.

    .. math:: \kappa \le 1 / \sqrt{u}

    Rounding M w to the dtype moves it by u relative to its norm, and M⁻¹ turns that into κ u
    relative to w. Up to κ u = √u a round trip keeps half of the digits: κ up to 9.5e7 for float64,
    4096 for float32, 45 for float16 and 16 for bfloat16.
    """
    return 1 / math.sqrt(unit_roundoff(dtype))


class Modulator(nn.Module, ABC):
    """A fixed, invertible linear map M of vectors of n weights; call it to apply it.

    Its numbers are buffers, in float64 whatever dtype the model is converted to: only their device
    changes. ``seed`` is the seed it was drawn from, or None.

    Args:
        size: n.
        seed: Where it comes from, for the record.

    Raises:
        ValueError: n < 1.
    """

    size: int
    seed: int | None
    _wide: bool = True  # computes in float64, rather than in the dtype of sums

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"{type(self).__name__}: expected at least one weight, got {size}")
        self.size = size
        self.seed = seed

    def forward(self, weights: Tensor) -> Tensor:
        """M w, of weights [..., n]; differentiable, so a gradient comes back through Mᵀ.

        Raises:
            TypeError: Not a tensor of float64, float32, bfloat16 or float16.
            ValueError: Not [..., n].
        """
        return self._run(self._map, weights)

    if TYPE_CHECKING:

        def __call__(self, weights: Tensor) -> Tensor:  # noqa: D102
            ...

    def inverse(self, weights: Tensor) -> Tensor:
        """M⁻¹ w; arguments and errors as of a call."""
        return self._run(self._inverse, weights)

    def transpose(self, weights: Tensor) -> Tensor:
        """Mᵀ w; arguments and errors as of a call."""
        return self._run(self._transpose, weights)

    @abstractmethod
    def _map(self, w: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse(self, w: Tensor) -> Tensor: ...

    @abstractmethod
    def _transpose(self, w: Tensor) -> Tensor: ...

    @torch.no_grad()
    def overwrite(self, parts: Sequence[Tensor], inverse: bool = False) -> None:
        """Set w to M w, or to M⁻¹ w, where it lies; not differentiable.

        Args:
            parts: Tensors whose elements, one after the other, are the n weights.
            inverse: Whether M⁻¹ is meant.

        Raises:
            ValueError: They are not n.
        """
        size = sum(part.numel() for part in parts)
        if size != self.size:
            raise ValueError(
                f"{type(self).__name__}: expected {self.size} weights to overwrite, got {size}"
            )
        self._overwrite(parts, inverse)

    def _overwrite(self, parts: Sequence[Tensor], inverse: bool) -> None:
        """By way of one vector; that of one contiguous part is itself."""
        flat = parts[0].reshape(-1) if len(parts) == 1 else copied(parts)
        write(parts, self._run(self._inverse_ if inverse else self._map_, flat))

    def _map_(self, w: Tensor) -> Tensor:
        """M w, in the memory of w where the kind can."""
        return self._map(w)

    def _inverse_(self, w: Tensor) -> Tensor:
        return self._inverse(w)

    @abstractmethod
    def singular_range(self) -> tuple[float, float]:
        """The least and the largest singular value, or bounds below and above where it says so."""

    @abstractmethod
    def _roundings(self) -> float:
        """g: M w is computed to within g e ‖M‖ ‖w‖, and M⁻¹ w likewise, e that of the sums."""

    def _error(self, dtype: torch.dtype) -> float:
        """The product g e, for weights of a dtype."""
        sums = torch.float64 if self._wide else accumulation_dtype(dtype)
        return self._roundings() * unit_roundoff(sums)

    def row_gain(self, shape: Sequence[int]) -> Tensor | None:
        """What M does to the rows of a weight, if that is no more than a gain of each.

        Args:
            shape: The weight's shape, [O, ...], of n numbers.

        Returns:
            The gains, [O], float64; None if M is anything else.
        """
        return None

    def condition_number(self) -> float:
        """κ, the ratio of the extreme singular values; of bounds, an upper bound."""
        low, high = self.singular_range()
        return high / low if low > 0 else math.inf

    def check(self, dtype: torch.dtype) -> None:
        """Refuse to modulate weights of a dtype.

        Raises:
            ValueError: The condition number is above :func:`condition_limit`, or not finite.
        """
        kappa, limit = self.condition_number(), condition_limit(dtype)
        if not kappa <= limit:
            raise ValueError(
                f"{type(self).__name__}: expected a condition number of at most {limit:.2g} for "
                f"weights of {str(dtype).removeprefix('torch.')}, got {kappa:.2g}; "
                "draw another seed, or take a better conditioned kind"
            )

    @torch.no_grad()
    def round_trip_error(self, weights: Tensor | None = None) -> float:
        """How far M⁻¹ (M w) misses w, relative to the norm of w, as computed.

        Args:
            weights: w, [..., n], of which the worst counts; a normal float32 vector if None.
        """
        if weights is None:
            weights = torch.from_numpy(Seeded(0).normal(self.size)).float().to(self._device())
        missed = self.inverse(self(weights)).double() - weights.double()
        norm = torch.linalg.vector_norm(weights.double(), dim=-1)
        error = torch.linalg.vector_norm(missed, dim=-1) / norm
        return float(torch.where(norm > 0, error, 0.0).max())

    def round_trip_bound(self, dtype: torch.dtype, trips: int = 1) -> float:
        r"""What :meth:`round_trip_error` cannot exceed, to first order, after a number of trips.

        .. math:: \text{trips} \cdot (\kappa (u + 2 g e) + u)

        u rounds the stored w and M w; g e ‖M‖ ‖w‖ is the error of computing M w (and so of M⁻¹ w),
        g being counted by each kind. Errors of many trips add up at most.
        """
        u = unit_roundoff(dtype)
        return trips * (self.condition_number() * (u + 2 * self._error(dtype)) + u)

    def dense(self) -> Tensor:
        """M as a matrix, [n, n], float64."""
        eye = torch.eye(self.size, dtype=torch.float64, device=self._device())
        return self(eye).T

    def __matmul__(self, other: Modulator) -> Composition:
        """(a @ b)(w) = a(b(w))."""
        if not isinstance(other, Modulator):
            return NotImplemented
        return Composition(other, self)

    def get_extra_state(self) -> Tensor:
        """What M consists of beside its buffers: the seed, if it has one, as 64 bits."""
        seed = [] if self.seed is None else [self.seed - 2**64 * (self.seed >= 2**63)]
        return torch.tensor(seed, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what a state_dict holds of that."""
        self.seed = int(state[0]) % 2**64 if len(state) else None

    def extra_repr(self) -> str:
        """Size and seed."""
        return f"{self.size}" + ("" if self.seed is None else f", seed={self.seed}")

    def _run(self, function: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
        name = type(self).__name__
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"{name}: expected weights to be a Tensor, got {type(weights).__name__}"
            )
        if weights.dtype not in FLOATING:
            raise TypeError(
                f"{name}: expected weights of dtype float64, float32, bfloat16 or float16, "
                f"got {str(weights.dtype).removeprefix('torch.')}"
            )
        if weights.dim() < 1 or weights.shape[-1] != self.size:
            raise ValueError(
                f"{name}: expected weights of shape [..., {self.size}], got {list(weights.shape)}"
            )
        sums = torch.float64 if self._wide else accumulation_dtype(weights.dtype)
        with torch.autocast(weights.device.type, enabled=False):
            return function(weights.to(sums)).to(weights.dtype)

    def _device(self) -> torch.device:
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    def _finite(self, name: str, values: Tensor, rank: int) -> Tensor:
        """Refuse what cannot be part of a modulator; the rest in float64."""
        kind = type(self).__name__
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"{kind}: expected {name} to be a floating-point Tensor, got {got}")
        if values.dim() != rank:
            raise ValueError(
                f"{kind}: expected {name} of {rank} dimensions, got shape {list(values.shape)}"
            )
        if not values.isfinite().all():
            raise ValueError(f"{kind}: expected {name} to be finite, got a NaN or an infinity")
        return values.detach().double().clone()

    def _apply(self: Self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move buffers, but keep their dtype: rounded, M would no longer be undone by M⁻¹."""
        for child in self.children():
            child._apply(fn)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                same = moved.dtype == buffer.dtype or buffer.is_meta
                self._buffers[name] = moved if same else buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._derive()

    def _derive(self) -> None:
        """Compute, and check, what follows from the buffers of the state."""


class Composition(Modulator):
    """One modulator after another: ``Composition(a, b)(w) = b(a(w))``.

    Singular values are bounded by products of the parts'.

    Raises:
        ValueError: No part, or parts of different sizes.
    """

    _wide = False  # each part has its own

    def __init__(self, *parts: Modulator) -> None:
        sizes = [part.size for part in parts]
        if not parts or len(set(sizes)) > 1:
            raise ValueError(f"Composition: expected modulators of one size, got sizes {sizes}")
        super().__init__(sizes[0])
        self.parts = cast(Sequence[Modulator], nn.ModuleList(parts))

    def _map(self, w: Tensor) -> Tensor:
        for part in self.parts:
            w = part(w)
        return w

    def _inverse(self, w: Tensor) -> Tensor:
        for part in reversed(self.parts):
            w = part.inverse(w)
        return w

    def _transpose(self, w: Tensor) -> Tensor:
        for part in reversed(self.parts):
            w = part.transpose(w)
        return w

    def singular_range(self) -> tuple[float, float]:
        """Bounds: the products of the parts' extremes."""
        ranges = [part.singular_range() for part in self.parts]
        return math.prod(low for low, _ in ranges), math.prod(high for _, high in ranges)

    def _roundings(self) -> float:
        return self.condition_number() * len(self.parts)  # of the parts' results

    def _error(self, dtype: torch.dtype) -> float:
        # What a part misses the other parts enlarge by their κ at most.
        inner = sum(part._error(dtype) for part in self.parts)
        return super()._error(dtype) + self.condition_number() * inner
