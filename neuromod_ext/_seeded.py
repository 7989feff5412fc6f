"""Random arrays that a seed gives bit for bit on every machine.

The bits are numpy's raw Philox stream, which numpy keeps stable. What is made of them here takes
only additions, multiplications, divisions and square roots of IEEE 754, element by element, whose
results do not depend on processor or library; so no sum of numpy's or BLAS's, and no libm.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_LN_2 = 0.6931471805599453
_LOG_TERMS = 13  # the next is below 2^-66 of the first: |z| <= 3 - 2√2


class Seeded:
    """A stream of random arrays.

    Args:
        seed: 0 to 2^64 - 1.
        stream: Another independent stream of the same seed, likewise.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        for name, value in (("seed", seed), ("stream", stream)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
                raise ValueError(f"Seeded: expected {name} from 0 to 2**64 - 1, got {value!r}")
        key = np.array([seed, stream], dtype=np.uint64)
        self._bits = np.random.Philox(key=key)

    def bits(self, n: int) -> NDArray[np.uint64]:
        """Draw n random words of 64 bits."""
        words: NDArray[np.uint64] = self._bits.random_raw(n)
        return words

    def uniform(self, n: int) -> Floats:
        """Draw n numbers, uniform on [0, 1): multiples of 2^-53."""
        return (self.bits(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def signs(self, n: int) -> NDArray[np.int8]:
        """Draw n times -1 or 1."""
        words = -(-n // 64)
        octets = self.bits(words).astype("<u8").view(np.uint8)
        bits = np.unpackbits(octets, bitorder="little")[:n]
        return 1 - 2 * bits.astype(np.int8)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """Draw the numbers 0 to n - 1 in random order."""
        return np.argsort(self.bits(n), kind="stable").astype(np.int64)

    def normal(self, n: int) -> Floats:
        """Draw n standard normal numbers, by Marsaglia's polar method."""
        parts: list[Floats] = []
        have = 0
        while have < n:
            draw = 2 * self.uniform(2 * (n - have + 8)) - 1
            x, y = draw[::2], draw[1::2]
            r = x * x + y * y
            inside = (r < 1) & (r > 0)
            x, y, r = x[inside], y[inside], r[inside]
            scale = np.sqrt(-2 * _log(r) / r)
            parts.append(np.stack((x * scale, y * scale), -1).reshape(-1))
            have += parts[-1].size
        return np.concatenate([*parts, np.empty(0)])[:n]

    def orthogonal(self, n: int) -> Floats:
        """Draw an orthogonal matrix, [n, n], uniform among all: Householder reflections (Stewart).

        About 5 n^3 operations: meant for up to a few thousand rows.
        """
        q = np.eye(n)
        for k in range(n - 2, -1, -1):
            v = self.normal(n - k)
            length = math.sqrt(_sum(v * v)[()])
            v[0] += math.copysign(length, v[0])
            block = q[k:, k:]
            dots = _sum(v[:, None] * block)
            block -= (2 / _sum(v * v)) * v[:, None] * dots
        return q * self.signs(n)


def _sum(terms: Floats) -> Any:
    """The sum over the first dimension, by halves: an order that is always the same."""
    while len(terms) > 1:
        half = len(terms) // 2
        rest = terms[2 * half :]
        terms = terms[:half] + terms[half : 2 * half]
        if len(rest):
            terms[0] += rest[0]
    return terms[0]


def _log(x: Floats) -> Floats:
    """Natural logarithm of positive normal numbers, by 2 artanh((m - 1) / (m + 1))."""
    m, exponent = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, exponent = np.where(low, 2 * m, m), exponent - low
    z = (m - 1) / (m + 1)
    square = z * z
    series = np.zeros_like(z)
    for k in range(_LOG_TERMS, -1, -1):
        series = series * square + 1 / (2 * k + 1)
    log: Floats = exponent * _LN_2 + 2 * z * series
    return log
