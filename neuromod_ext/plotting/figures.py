"""Accuracy against the condition, and the path of a manifold through its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neuromod_ext import functional
from neuromod_ext.plotting._axes import STYLES, single
from neuromod_ext.topology import Topology

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

_ON_CURVE = 241  # points
_LABEL: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "fontsize": 8.5,
    "textcoords": "offset points",
}


def plot_accuracy(
    degrees: ArrayLike,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    seen: Sequence[float],
    *,
    title: str = "",
) -> Figure:
    """Draw test accuracy against the angle, a line and a band for each model.

    Args:
        degrees: The angles, [A], ascending from 0, below 360 degrees.
        curves: By model, the mean accuracy and the half-width of its 95 % interval, [A] each, in
            percent; there is no band where the half-width is NaN.
        seen: The angles of training, in degrees.
        title: Stands above the figure.

    Returns:
        The figure; ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: There is no matplotlib.
        ValueError: There are more curves than styles.
    """
    if len(curves) > len(STYLES):
        raise ValueError(f"plot_accuracy: expected at most {len(STYLES)} curves, got {len(curves)}")
    figure, axes = single(7.2, 4.6, title)
    x = _closed(degrees, 360)
    lowest = 100.0
    for (name, band), style in zip(curves.items(), STYLES, strict=False):
        mean, half = (_closed(values) for values in band)
        lowest = min(lowest, float(np.min(mean - np.nan_to_num(half))))
        axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.16, lw=0)
        axes.plot(x, mean, label=name, linewidth=1.9, **style)
    for i, angle in enumerate(_closed(seen, 360)):
        label = "_" if i else "seen in training"
        axes.axvline(angle, color="0.8", linewidth=1, zorder=0, label=label)
    axes.set(
        xlabel="angle of rotation (°)",
        ylabel="test accuracy (%)",
        xlim=(0, 360),
        ylim=(max(0, lowest - 2), 100),
        xticks=np.arange(0, 361, 45),
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_manifold_path(
    snapshots: Mapping[int, Tensor],
    topology: Topology,
    *,
    marks: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    r"""Draw a curve of weights, as training moved it, in the plane that shows most of it.

    .. math:: W(s) = \sum_k c_k(s) P_k

    The plane is that of the first two principal components of all curves' points together.

    Args:
        snapshots: By epoch, ascending, the basis points P, [K, ...].
        topology: Their topology; its conditions are numbers in [0, 1].
        marks: Conditions to mark, by name; a thin line follows each through the epochs.
        title: Stands above the figure.

    Returns:
        The figure; ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: There is no matplotlib.
        ValueError: There is no snapshot, or conditions are not numbers.
    """
    if not snapshots or topology.condition_shape:
        raise ValueError(
            "plot_manifold_path: expected snapshots, and a topology whose conditions are numbers, "
            f"got {len(snapshots)} snapshots and {topology!r}"
        )
    marks = marks or {}
    conditions = torch.cat((torch.linspace(0, 1, _ON_CURVE), torch.tensor(list(marks.values()))))
    coeff = topology(conditions)
    basis = [p.detach().cpu().float().flatten(1) for p in snapshots.values()]
    weights = torch.stack([functional.interpolate_weights(p, coeff) for p in basis])
    projected, share = principal_components(weights.flatten(0, 1), 2)
    plane = projected.unflatten(0, weights.shape[:2]).numpy()
    curves, marked = plane[:, :_ON_CURVE], plane[:, _ON_CURVE:]

    figure, axes = single(7.2, 5.4, title)
    from matplotlib import colormaps, patheffects

    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    colours = colormaps["viridis_r"](np.linspace(0.08, 1, len(curves)))
    axes.plot(marked[..., 0], marked[..., 1], color="0.75", linewidth=0.8, zorder=1)
    for epoch, curve, dots, colour in zip(snapshots, curves, marked, colours, strict=True):
        axes.plot(*curve.T, color=colour, linewidth=2, label=f"{epoch}")
        axes.plot(*dots.T, "o", color=colour, markersize=4)
    for name, point in zip(marks, marked[-1], strict=True):
        right, up = (16, 12) * _outward(curves[-1], point)
        axes.annotate(name, point, (right, up), path_effects=halo, **_LABEL)
    axes.set(
        xlabel=f"principal component 1 ({100 * share[0]:.0f} % of variance)",
        ylabel=f"principal component 2 ({100 * share[1]:.0f} % of variance)",
        aspect="equal",
    )
    axes.margins(0.08)
    figure.legend(loc="outside right center", title="after epoch", frameon=False)
    return figure


def principal_components(points: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Project points on the n directions in which they vary most.

    The sign of each direction makes its largest entry positive.

    Args:
        points: [N, D].
        n: At most min(N, D).

    Returns:
        The projections of the centred points, [N, n], and each direction's share of the variance,
        [n], in float64.

    Raises:
        ValueError: n is out of its range.
    """
    if not 1 <= n <= min(points.shape):
        raise ValueError(f"principal_components: expected n from 1 to {min(points.shape)}, got {n}")
    centred = points.double() - points.double().mean(0)
    _, scale, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:n]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    variance = scale.square()
    return centred @ (directions * largest.sign()).T, variance[:n] / variance.sum()


def _closed(values: ArrayLike, turn: float = 0) -> NDArray[np.float64]:
    """Values around a circle, the first once more at the end, a turn later."""
    values = np.asarray(values, dtype=np.float64)
    return np.append(values, values[0] + turn)


def _outward(curve: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unit normal of a curve, [n, 2], at the point next to this one, away from its middle."""
    i = int(np.linalg.norm(curve - point, axis=1).argmin())
    along = curve[min(i + 1, len(curve) - 1)] - curve[max(i - 1, 0)]
    normal = np.array([along[1], -along[0]]) / max(float(np.linalg.norm(along)), 1e-12)
    return normal if normal @ (point - curve.mean(0)) > 0 else -normal
