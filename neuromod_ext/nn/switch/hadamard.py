"""Random rotations of any number of weights in O(n log n)."""

from __future__ import annotations

import torch
from torch import Tensor

from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch.kronecker import kronecker_product
from neuromod_ext.nn.switch.modulator import Modulator

HADAMARD_LEVELS = 6  # a factor of 64 x 64 is a fast matrix product, and small beside the weights


def hadamard_transform(x: Tensor) -> Tensor:
    """H x over the last dimension, of a power of two of elements; H is symmetric, H H = n."""
    levels = x.shape[-1].bit_length() - 1
    if levels == 0:
        return x
    steps = -(-levels // HADAMARD_LEVELS)
    pair = x.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    factors = []
    for i in range(steps):
        factor = pair
        for _ in range((levels + i) // steps - 1):
            factor = torch.kron(pair, factor)
        factors.append(factor)
    return kronecker_product(factors, x)


class Hadamard(Modulator):
    r"""A random rotation of n weights by random signs: O(n log n) time, O(n) memory.

    .. math:: M = R_2 R_1, \qquad R = p^{-1/2} H_p D \text{ on } p \text{ of the weights}

    H_p is Hadamard's matrix, D a diagonal of random signs. Padding the weights to a power of two
    would rotate them out of their space, so two powers of two share the work: R_1 rotates the first
    p weights, p the largest power of two in n. R_2 rotates the last q, which are the other n - p
    and at least as many of the first p; it is left out where n = p.

    Args:
        n: Number of weights.
        seed: The seed of the signs.
    """

    signs: Tensor
    _wide = False

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(n, seed)
        self._first = 1 << (n.bit_length() - 1)
        rest = n - self._first
        self._last = min(self._first, 1 << (2 * rest - 1).bit_length()) if rest else 0
        signs = torch.from_numpy(Seeded(seed).signs(self._first + self._last))
        self.register_buffer("signs", signs)

    @classmethod
    def random(cls, n: int, seed: int) -> Hadamard:
        """The same as the constructor, for symmetry with the other kinds."""
        return cls(n, seed)

    def _blocks(self) -> list[tuple[int, int, Tensor]]:
        """Where each rotation begins and ends, and its signs; the first one first."""
        blocks = [(0, self._first, self.signs[: self._first])]
        if self._last:
            blocks.append((self.size - self._last, self.size, self.signs[self._first :]))
        return blocks

    def _map(self, w: Tensor) -> Tensor:
        return self._rotated(w, inverse=False)

    def _inverse(self, w: Tensor) -> Tensor:
        return self._rotated(w, inverse=True)

    _transpose = _inverse

    def _rotated(self, w: Tensor, inverse: bool) -> Tensor:
        blocks = self._blocks()
        for low, high, signs in reversed(blocks) if inverse else blocks:
            part, factor = w[..., low:high], signs.to(w.dtype) * (high - low) ** -0.5
            part = (
                hadamard_transform(part) * factor if inverse else hadamard_transform(part * factor)
            )
            w = torch.cat((w[..., :low], part, w[..., high:]), -1)
        return w

    def singular_range(self) -> tuple[float, float]:
        """Both are 1."""
        return 1.0, 1.0

    def _roundings(self) -> float:
        # Of each rotation: sums of 2^6 terms at a time, of norm ≤ 2^3 ‖w‖; scale and its product.
        levels = self._first.bit_length() - 1
        factors = -(-levels // HADAMARD_LEVELS)
        return 2 * (factors * 2 ** (1.5 * min(HADAMARD_LEVELS, levels)) + 3)
