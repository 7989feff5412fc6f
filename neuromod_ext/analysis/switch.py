"""Where switched networks lie in the space of their parameters, and what a switch costs."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Distances(NamedTuple):
    """Of every pair of networks, one of each of two groups, [N * M] each.

    Attributes:
        cosine: 1 − the cosine of the angle between their parameters; 0 to 2.
        euclidean: The length of their difference.
    """

    cosine: Tensor
    euclidean: Tensor


def pair_distances(one: Tensor, other: Tensor | None = None) -> Distances:
    """How far networks of two groups are apart, or those of one group from each other.

    Args:
        one: Parameters, [N, D].
        other: [M, D]; None for the N (N − 1) / 2 pairs within ``one``.

    Returns:
        The distances, in float64.

    Raises:
        ValueError: Shapes that do not fit.
    """
    second = one if other is None else other
    if one.dim() != 2 or second.dim() != 2 or one.shape[1] != second.shape[1]:
        raise ValueError(
            "pair_distances: expected parameters of shapes [N, D] and [M, D], got "
            f"{list(one.shape)} and {list(second.shape)}"
        )
    a, b = one.double(), second.double()
    difference = (a.unsqueeze(1) - b.unsqueeze(0)).norm(dim=-1)
    cosine = 1 - (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    if other is not None:
        return Distances(cosine.flatten(), difference.flatten())
    above = cosine.new_ones(len(a), len(a)).triu(1).bool()
    return Distances(cosine[above], difference[above])


def nearest_distance(points: Tensor, cluster: Tensor) -> Tensor:
    """How far each point is from the nearest member of a cluster, [N] of [N, D] and [M, D]."""
    apart = points.double().unsqueeze(1) - cluster.double().unsqueeze(0)
    nearest: Tensor = apart.norm(dim=-1).min(1).values
    return nearest


def switch_peaks(losses: Tensor) -> Tensor:
    """The loss right after each switch.

    Args:
        losses: [cycles, states, period, ...]: before each step, by cycle and state.

    Returns:
        [cycles, states, ...]: the largest loss of each period, which a switch has begun.

    Raises:
        ValueError: Fewer than three dimensions, or an empty period.
    """
    if losses.dim() < 3 or losses.shape[2] == 0:
        raise ValueError(
            "switch_peaks: expected losses of shape [cycles, states, period, ...] with a period "
            f"of at least 1, got {list(losses.shape)}"
        )
    return losses.amax(2)


def success_interval(successes: int, runs: int, z: float = 1.959964) -> tuple[float, float]:
    r"""Wilson's interval of a success rate, 95 % by default.

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}}{1 + z^2 / n}

    Raises:
        ValueError: Not 0 <= successes <= runs, or no run.
    """
    if not 0 <= successes <= runs or runs == 0:
        raise ValueError(
            f"success_interval: expected 0 <= successes <= runs, got {successes} of {runs}"
        )
    p, n = successes / runs, runs
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
