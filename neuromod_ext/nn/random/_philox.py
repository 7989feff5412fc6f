"""What fixed layers draw from a seed, the same bits on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from neuromod_ext._seeded import Seeded


def uniform(seed: int, stream: int, shape: Sequence[int], bound: float) -> Tensor:
    """Numbers from [-bound, bound), float64: a multiple of 2^-52 in [-1, 1), times the bound."""
    values = 2 * Seeded(seed, stream).uniform(math.prod(shape)) - 1
    return torch.from_numpy(values * bound).reshape(tuple(shape))


def subsets(seed: int, stream: int, rows: int, size: int, count: int) -> Tensor:
    """Sorted random subsets of ``count`` of range(size), int32, [rows, count].

    By Floyd's algorithm: the k-th number is drawn from range(size - count + k + 1), and is the
    last of these if it was drawn before.
    """
    raw = Seeded(seed, stream).bits(rows * count).reshape(count, rows)
    chosen = np.empty((rows, count), dtype=np.int32)
    for k in range(count):
        last = size - count + k
        drawn = ((raw[k] >> np.uint64(32)) * np.uint64(last + 1) >> np.uint64(32)).astype(np.int32)
        again = (chosen[:, :k] == drawn[:, None]).any(1)
        chosen[:, k] = np.where(again, last, drawn)
    return torch.from_numpy(np.sort(chosen, axis=1))
