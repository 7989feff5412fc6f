"""Random rotations of any number of weights in O(n log n)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuromod_ext import functional
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext._hadamard_checks import num_signs, rotations
from neuromod_ext._hadamard_reference import LEVELS
from neuromod_ext._ops import EXTENSION
from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch.modulator import Modulator


class Hadamard(Modulator):
    r"""A random rotation of n weights by random signs: O(n log n) time, O(n) memory.

    .. math:: M = R_2 R_1, \qquad R = p^{-1/2} H_p D \text{ on } p \text{ of the weights}

    H_p is Hadamard's matrix, D a diagonal of random signs. Padding the weights to a power of
    two would rotate them out of their space, so two powers of two share the work: R_1 rotates
    the first p weights, p the largest power of two in n. R_2 rotates the last q, the least
    power of two that is 2 (n - p) or more, but p at most; it is left out where n = p. It is
    computed by :func:`neuromod_ext.functional.hadamard_rotate`.

    Args:
        n: Number of weights.
        seed: The seed of the signs.
    """

    signs: Tensor
    _wide = False

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(n, seed)
        signs = torch.from_numpy(Seeded(seed).signs(num_signs(n)))
        self.register_buffer("signs", signs)

    @classmethod
    def random(cls, n: int, seed: int) -> Hadamard:
        """The same as the constructor, for symmetry with the other kinds."""
        return cls(n, seed)

    def _map(self, w: Tensor) -> Tensor:
        return functional.hadamard_rotate(w, self.signs)

    def _inverse(self, w: Tensor) -> Tensor:
        return functional.hadamard_rotate(w, self.signs, inverse=True)

    _transpose = _inverse

    def _overwrite(self, parts: Sequence[Tensor], inverse: bool) -> None:
        if parts[0].dtype == accumulation_dtype(parts[0].dtype):
            functional.hadamard_rotate_(parts, self.signs, inverse)
        else:
            super()._overwrite(parts, inverse)

    def singular_range(self) -> tuple[float, float]:
        """Both are 1."""
        return 1.0, 1.0

    def _roundings(self) -> float:
        # Of each rotation: its levels, scale and product. Without the kernel, sums of 2^6 terms at
        # a time, of norm ≤ 2^3 ‖w‖, in place of the levels.
        levels = (rotations(self.size)[0][1]).bit_length() - 1
        if EXTENSION:
            return 2 * (levels + 3)
        return 2 * (-(-levels // LEVELS) * 2 ** (1.5 * min(LEVELS, levels)) + 3)
