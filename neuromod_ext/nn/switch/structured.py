"""Modulators that take O(n) memory: gains, permutations, low rank, blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch.modulator import Modulator


def gains(n: int, seed: Seeded, low: float, high: float) -> Tensor:
    """Draw n numbers, uniform between two positive ones."""
    if not 0 < low <= high < float("inf"):
        raise ValueError(f"random: expected gains with 0 < low <= high, got {low} to {high}")
    return torch.from_numpy(low + (high - low) * seed.uniform(n))


class Diagonal(Modulator):
    r"""A gain for each weight, or for so many weights in a row.

    .. math:: w'_i = g_{\lfloor i / r \rfloor} w_i

    Args:
        gain: g, [n / r], none of them 0.
        seed: Where it comes from, for the record.
        row: r, how many weights in a row share a gain.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not a vector, not finite, a condition number above
            ``condition_limit(torch.float64)``, or r < 1.
    """

    gain: Tensor
    _wide = False

    def __init__(self, gain: Tensor, seed: int | None = None, row: int = 1) -> None:
        if row < 1:
            raise ValueError(f"Diagonal: expected at least one weight in a row, got row = {row}")
        super().__init__(max(1, gain.numel() * row if isinstance(gain, Tensor) else 1), seed)
        self.row = row
        self.register_buffer("gain", self._finite("gain", gain, 1))
        self._derive()

    @classmethod
    def random(cls, n: int, seed: int, low: float = 0.5, high: float = 2.0) -> Diagonal:
        """Independent gains, uniform from low to high (our choice)."""
        return cls(gains(n, Seeded(seed), low, high), seed)

    @classmethod
    def per_neuron(
        cls, shape: Sequence[int], seed: int, low: float = 0.5, high: float = 2.0
    ) -> Diagonal:
        """One gain for all weights of an output neuron, its receptor density.

        Where all modulators of a layer are such, :class:`Switchable` scales the layer's outputs
        instead of its weights in a call with states or doses.

        Args:
            shape: The shape of a layer's weight, [O, ...].
            seed: As in :meth:`random`.
            low: The least gain.
            high: The largest.
        """
        weights = torch.Size(shape[1:]).numel()
        return cls(gains(shape[0], Seeded(seed), low, high), seed, weights)

    def _derive(self) -> None:
        self.check(torch.float64)

    def _by_rows(self, operation: Callable[[Tensor, Tensor], Tensor], w: Tensor) -> Tensor:
        gain = self.gain.to(w.dtype)
        if self.row == 1:
            return operation(w, gain)
        return operation(w.unflatten(-1, (-1, self.row)), gain.unsqueeze(-1)).flatten(-2)

    def _map(self, w: Tensor) -> Tensor:
        return self._by_rows(torch.mul, w)

    _transpose = _map

    def _inverse(self, w: Tensor) -> Tensor:
        return self._by_rows(torch.div, w)

    def _map_(self, w: Tensor) -> Tensor:
        return self._by_rows(Tensor.mul_, w)

    def _inverse_(self, w: Tensor) -> Tensor:
        return self._by_rows(Tensor.div_, w)

    def row_gain(self, shape: Sequence[int]) -> Tensor | None:
        """g, where a row of the weight is what shares a gain."""
        return self.gain if torch.Size(shape[1:]).numel() == self.row else None

    def singular_range(self) -> tuple[float, float]:
        """The extreme magnitudes of the gains."""
        size = self.gain.abs()
        return float(size.min()), float(size.max())

    def _roundings(self) -> float:
        return 2  # the gain, and the product


class ScaledPermutation(Modulator):
    r"""Weights change places, and each gets a gain.

    .. math:: w'_i = g_i w_{p(i)}

    Gains that are powers of two make a switch exact, down to the last bit.

    Args:
        permutation: p, [n], int64: each of 0 to n - 1 once.
        gain: g, [n]; 1 if None.
        seed: Where it comes from, for the record.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: Not a permutation, or gains that ``Diagonal`` would refuse.
    """

    permutation: Tensor
    _wide = False

    def __init__(
        self, permutation: Tensor, gain: Tensor | None = None, seed: int | None = None
    ) -> None:
        if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
            raise TypeError("ScaledPermutation: expected permutation to be a Tensor of int64")
        n = permutation.numel()
        super().__init__(n, seed)
        self.register_buffer("permutation", permutation.clone())
        self.gain = Diagonal(torch.ones(n, device=permutation.device) if gain is None else gain)
        if self.gain.size != n:
            raise ValueError(
                f"ScaledPermutation: expected gain of shape [n] = [{n}], got [{self.gain.size}]"
            )
        self._derive()

    @classmethod
    def random(cls, n: int, seed: int, low: float = 0.5, high: float = 2.0) -> ScaledPermutation:
        """A uniform permutation, with gains uniform from low to high (our choice)."""
        stream = Seeded(seed)
        return cls(torch.from_numpy(stream.permutation(n)), gains(n, stream, low, high), seed)

    def _derive(self) -> None:
        p = self.permutation
        numbers = torch.arange(p.numel(), device=p.device)
        if p.dim() != 1 or not torch.equal(p.sort().values, numbers):
            raise ValueError(
                "ScaledPermutation: expected permutation to hold each of 0 to n - 1 once, got "
                f"shape {list(p.shape)} with {p.unique().numel()} different numbers"
            )

    def _map(self, w: Tensor) -> Tensor:
        return self.gain._map(w[..., self.permutation])

    def _inverse(self, w: Tensor) -> Tensor:
        return self.gain._inverse(w)[..., self.permutation.argsort()]

    def _transpose(self, w: Tensor) -> Tensor:
        return self.gain._map(w)[..., self.permutation.argsort()]

    def singular_range(self) -> tuple[float, float]:
        """The extreme magnitudes of the gains."""
        return self.gain.singular_range()

    def _roundings(self) -> float:
        return 2


class LowRank(Modulator):
    r"""A diagonal and a few directions: n (1 + 2 r) numbers.

    .. math:: M = D + U V^\top, \qquad
        M^{-1} = D^{-1} - D^{-1} U (1 + V^\top D^{-1} U)^{-1} V^\top D^{-1}

    The inverse is Woodbury's. Singular values are bounded: by ‖D‖ + ‖U‖ ‖V‖ above, and by the same
    of the inverse below.

    Args:
        diagonal: D, [n], none of them 0.
        left: U, [n, r].
        right: V, [n, r].
        seed: Where it comes from, for the record.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: Shapes that do not fit, numbers that are not finite, or a bound of the condition
            number above ``condition_limit(torch.float64)``.
    """

    diagonal: Tensor
    left: Tensor
    right: Tensor
    core: Tensor

    def __init__(
        self, diagonal: Tensor, left: Tensor, right: Tensor, seed: int | None = None
    ) -> None:
        super().__init__(max(1, diagonal.numel() if isinstance(diagonal, Tensor) else 1), seed)
        self.register_buffer("diagonal", self._finite("diagonal", diagonal, 1))
        for name, factor in (("left", left), ("right", right)):
            factor = self._finite(name, factor, 2)
            if factor.shape != (self.size, left.shape[1]):
                raise ValueError(
                    f"LowRank: expected {name} of shape [n, r] = [{self.size}, {left.shape[1]}], "
                    f"got {list(factor.shape)}"
                )
            self.register_buffer(name, factor)
        rank = left.shape[1]
        core = torch.empty(rank, rank, dtype=torch.float64, device=left.device)
        self.register_buffer("core", core, persistent=False)
        self._derive()

    @classmethod
    def random(cls, n: int, seed: int, rank: int = 1) -> LowRank:
        """1 + U Vᵀ with independent normal entries of variance 1/n (our choice)."""
        both = torch.from_numpy(Seeded(seed).normal(2 * n * rank)).view(2, n, rank) / n**0.5
        return cls(torch.ones(n), both[0], both[1], seed)

    def _derive(self) -> None:
        least = self.diagonal.abs().min()
        scaled = self.left / self.diagonal.unsqueeze(1)
        inner = self.right.T @ scaled
        inner += torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        self.core, info = torch.linalg.inv_ex(inner)
        self._range = 0.0, float("inf")
        if least > 0 and not info.any():
            other = self.right / self.diagonal.unsqueeze(1)
            inverse = 1 / least + _norm(scaled @ self.core) * _norm(other)
            high = self.diagonal.abs().max() + _norm(self.left) * _norm(self.right)
            self._range = float(1 / inverse), float(high)
        self.check(torch.float64)

    def _map(self, w: Tensor) -> Tensor:
        return w * self.diagonal + (w @ self.right) @ self.left.T

    def _transpose(self, w: Tensor) -> Tensor:
        return w * self.diagonal + (w @ self.left) @ self.right.T

    def _inverse(self, w: Tensor) -> Tensor:
        w = w / self.diagonal
        return w - ((w @ self.right) @ self.core.T) @ (self.left / self.diagonal.unsqueeze(1)).T

    def singular_range(self) -> tuple[float, float]:
        """Bounds, as the class says."""
        return self._range

    def _roundings(self) -> float:
        # Sums of n and of r terms, whose magnitudes exceed ‖M‖ ‖w‖ by less than r κ.
        rank = len(self.core)
        return (self.size + rank + 3) * (1 + rank) * self.condition_number() ** 2


def _norm(matrix: Tensor) -> Tensor:
    """The largest singular value of a tall matrix, by its small Gram matrix; 0 of an empty one."""
    if matrix.shape[1] == 0:
        return matrix.new_zeros(())
    largest: Tensor = torch.linalg.eigvalsh(matrix.T @ matrix)[-1]
    return largest.clamp(min=0).sqrt()


class BlockDiagonal(Modulator):
    """Consecutive parts of the weights, each with a modulator of its own: one per layer, say.

    Args:
        *blocks: The modulators, in the order of the weights.

    Raises:
        ValueError: No block.
    """

    _wide = False  # each block has its own

    def __init__(self, *blocks: Modulator) -> None:
        super().__init__(sum(block.size for block in blocks))
        self.blocks = cast(Sequence[Modulator], nn.ModuleList(blocks))
        self.sizes = [block.size for block in blocks]

    def _map(self, w: Tensor) -> Tensor:
        parts = zip(self.blocks, w.split(self.sizes, -1), strict=True)
        return torch.cat([block(part) for block, part in parts], -1)

    def _inverse(self, w: Tensor) -> Tensor:
        parts = zip(self.blocks, w.split(self.sizes, -1), strict=True)
        return torch.cat([block.inverse(part) for block, part in parts], -1)

    def _transpose(self, w: Tensor) -> Tensor:
        parts = zip(self.blocks, w.split(self.sizes, -1), strict=True)
        return torch.cat([block.transpose(part) for block, part in parts], -1)

    def _overwrite(self, parts: Sequence[Tensor], inverse: bool) -> None:
        if [part.numel() for part in parts] == self.sizes:
            for block, part in zip(self.blocks, parts, strict=True):
                block.overwrite([part], inverse)
        else:
            super()._overwrite(parts, inverse)

    def singular_range(self) -> tuple[float, float]:
        """The least and the largest of all blocks'."""
        lows, highs = zip(*(block.singular_range() for block in self.blocks), strict=True)
        return min(lows), max(highs)

    def _roundings(self) -> float:
        return 1

    def _error(self, dtype: torch.dtype) -> float:
        return super()._error(dtype) + max(block._error(dtype) for block in self.blocks)
