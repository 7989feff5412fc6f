"""Modulators that are Kronecker products of small matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuromod_ext._hadamard_reference import kronecker_product
from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch.dense import square
from neuromod_ext.nn.switch.modulator import Modulator
from neuromod_ext.nn.switch.structured import gains


class Kronecker(Modulator):
    r"""A Kronecker product; with two factors, W' = A W Bᵀ of a weight W [O, I].

    .. math:: M = F_1 \otimes \dots \otimes F_m, \qquad n = n_1 \cdots n_m

    It takes n (n_1 + … + n_m) multiplications, so more and smaller factors are faster: a side of
    1024 may be two factors of 32.

    Args:
        *factors: The matrices, square, of sizes n_1 to n_m.
        seed: Where they come from, for the record.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: No factor, one that is not square or not finite, or a condition number above
            ``condition_limit(torch.float64)``.
    """

    _wide = False

    def __init__(self, *factors: Tensor, seed: int | None = None) -> None:
        super().__init__(math.prod(len(f) for f in factors) if factors else 0, seed)
        for i, factor in enumerate(factors):
            matrix = square(self, f"factor {i}", factor)
            self.register_buffer(f"factor_{i}", matrix)
            self.register_buffer(f"inverse_{i}", torch.empty_like(matrix), persistent=False)
        self._count = len(factors)
        self._derive()

    @classmethod
    def random(cls, *sizes: int, seed: int, low: float = 0.5, high: float = 2.0) -> Kronecker:
        """Factors that rotate and scale: orthogonal matrices times uniform gains (our choice).

        Args:
            *sizes: n_1 to n_m; O and I for a layer's weight.
            seed: The seed.
            low: The least gain of a factor; its condition number is at most high / low.
            high: The largest.
        """
        factors = []
        for i, n in enumerate(sizes):
            stream = Seeded(seed, stream=i)
            scale = gains(n, stream, low, high)
            factors.append(torch.from_numpy(stream.orthogonal(n)) * scale)
        return cls(*factors, seed=seed)

    def _named(self, kind: str, like: Tensor) -> list[Tensor]:
        return [getattr(self, f"{kind}_{i}").to(like.dtype) for i in range(self._count)]

    def _derive(self) -> None:
        low = high = 1.0
        for i in range(self._count):
            factor = getattr(self, f"factor_{i}")
            values = torch.linalg.svdvals(factor)
            low, high = low * float(values[-1]), high * float(values[0])
            setattr(self, f"inverse_{i}", torch.linalg.inv_ex(factor).inverse)
        self._range = low, high
        self.check(torch.float64)

    def _map(self, w: Tensor) -> Tensor:
        return kronecker_product(self._named("factor", w), w)

    def _inverse(self, w: Tensor) -> Tensor:
        return kronecker_product(self._named("inverse", w), w)

    def _transpose(self, w: Tensor) -> Tensor:
        return kronecker_product([f.T for f in self._named("factor", w)], w)

    def singular_range(self) -> tuple[float, float]:
        """The products of the factors' extremes."""
        return self._range

    def _roundings(self) -> float:
        # A factor's dot product of n_i terms, and the rounding of its entries: n_i + 1 roundings
        # of |F| |w|, of norm ≤ √n_i ‖F‖ ‖w‖; the other factors enlarge it by their κ at most.
        sizes = [len(f) for f in self._named("factor", torch.empty(0))]
        return self.condition_number() * sum((n + 1) * math.sqrt(n) for n in sizes)
