"""The switch paper's figures; needs matplotlib, ``pip install neuromod_ext[papers]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neuromod_ext.plotting._axes import STYLES, empty, single

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

Clusters = Mapping[str, "ArrayLike"]


def plot_task_structure(
    networks: Mapping[str, tuple[Clusters, Mapping[str, ArrayLike], Mapping[str, ArrayLike]]],
    *,
    title: str = "",
) -> Figure:
    """Draw where trained networks lie, and how far those of two tasks are apart.

    Args:
        networks: By kind of network, one row each: the networks of each task in the space of the
            first three principal components, [N, 3]; and for some pairs of tasks the cosine and
            the Euclidean distances, [P].
        title: Stands above the figure.

    Returns:
        The figure.

    Raises:
        ImportError: There is no matplotlib.
    """
    figure = empty(11, 3.6 * len(networks), title)
    grid = figure.add_gridspec(len(networks), 3, width_ratios=(1.4, 1, 1))
    for row, (kind, (clusters, cosine, euclidean)) in enumerate(networks.items()):
        space: Any = figure.add_subplot(grid[row, 0], projection="3d")
        for (task, points), style in zip(clusters.items(), STYLES, strict=False):
            space.scatter(*np.asarray(points).T, s=7, label=task, color=style["color"])
        space.set(xlabel="PC 1", title=kind)
        space.set_ylabel("PC 2", labelpad=7)
        space.set_zlabel("PC 3", labelpad=4)
        # beside the box, whose right edge bears the ticks of PC 3
        space.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(0.0, 1.0))
        for column, (name, pairs) in enumerate((("cosine", cosine), ("Euclidean", euclidean)), 1):
            axes = figure.add_subplot(grid[row, column])
            top = max(float(np.max(values)) for values in pairs.values())
            for (pair, values), style in zip(pairs.items(), STYLES, strict=False):
                shape: dict[str, Any] = {
                    "bins": 25,
                    "range": (0, top),
                    "density": True,
                    "histtype": "step",
                }
                axes.hist(np.asarray(values), label=pair, **shape, **style)
            axes.set(xlabel=f"{name} distance", ylabel="density")
            axes.legend(fontsize=8, frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_co_optimisation(
    runs: Mapping[str, Mapping[str, ArrayLike]],
    clusters: Clusters,
    tasks: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Draw how networks learn two tasks in turns: path, loss, peaks and successes.

    Args:
        runs: By name (a period, say), one row each, of: ``path``, [T, 2], of one run in the plane
            of ``clusters``; ``states``, [T], in which of two it was there; ``losses``, [T], its
            loss; ``peaks``, [cycles, states], the median loss after a switch; ``success``,
            [cycles], the share of runs right on both. Of the switches, a few are drawn.
        clusters: Networks trained for one task only, [N, 2], by task.
        tasks: Their names, by state.
        title: Stands above the figure.

    Returns:
        The figure.

    Raises:
        ImportError: There is no matplotlib.
    """
    figure = empty(13, 2.8 * len(runs), title)
    grid: Any = figure.subplots(len(runs), 4, squeeze=False)
    for (name, run), row in zip(runs.items(), grid, strict=True):
        _path(row[0], np.asarray(run["path"]), np.asarray(run["states"]), clusters)
        row[0].set_title(name, fontsize=10, loc="left")
        row[1].plot(np.asarray(run["losses"]), color="0.3", linewidth=0.6)
        row[1].set(xlabel="epoch", ylabel="loss, one run")
        for state, (task, style) in enumerate(zip(tasks, STYLES, strict=False)):
            row[2].plot(np.asarray(run["peaks"])[:, state], label=task, **style)
        row[2].set(xlabel="cycle", ylabel="loss after a switch, median")
        row[2].legend(fontsize=8, frameon=False)
        row[3].plot(100 * np.asarray(run["success"]), color=STYLES[2]["color"])
        row[3].set(xlabel="cycle", ylabel="right in both states (% of runs)", ylim=(0, 102))
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
        for axes in row[2:]:
            axes.set_xscale("log")
    return figure


def plot_success(rates: Mapping[str, tuple[float, float, float]], *, title: str = "") -> Figure:
    """Draw success rates as bars with their intervals.

    Args:
        rates: By name, the rate and the ends of its interval, in percent.
        title: Stands above the figure.

    Returns:
        The figure.

    Raises:
        ImportError: There is no matplotlib.
    """
    figure, axes = single(7.2, 0.9 + 0.32 * len(rates), title)
    at = np.arange(len(rates))[::-1]
    middle, low, high = np.array(list(rates.values())).T
    axes.barh(at, middle, color=STYLES[0]["color"], alpha=0.75, height=0.7)
    axes.errorbar(
        middle, at, xerr=(middle - low, high - middle), fmt="none", color="0.2", capsize=2
    )
    axes.set(yticks=at, yticklabels=list(rates), xlabel="success (% of starts)", xlim=(0, 100))
    return figure


def plot_accuracy_by_size(
    sizes: Mapping[str, ArrayLike],
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    runs: Mapping[str, Sequence[ArrayLike]] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Draw accuracy against the number of parameters, a line and a band for each model.

    Args:
        sizes: By model, the numbers of parameters, [S], ascending.
        curves: By model, the mean accuracy and the half-width of its interval, [S], in percent.
        runs: By model, the accuracy of each run, [S, runs], drawn as dots; none if None.
        title: Stands above the figure.

    Returns:
        The figure.

    Raises:
        ImportError: There is no matplotlib.
    """
    figure, axes = single(6.6, 4.4, title)
    for (name, band), style in zip(curves.items(), STYLES, strict=False):
        mean, half = (np.asarray(values, dtype=np.float64) for values in band)
        x = np.asarray(sizes[name])
        axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.16, lw=0)
        axes.plot(x, mean, label=name, marker="o", markersize=3, **style)
        if runs is not None:
            axes.plot(x, np.asarray(runs[name]), ".", color=style["color"], markersize=3, alpha=0.6)
    axes.set(xlabel="parameters", ylabel="test accuracy, mean of both tasks (%)", xscale="log")
    axes.set_ylim(top=101)
    axes.legend(frameon=False)
    return figure


def _path(
    axes: Axes, path: NDArray[np.float64], states: NDArray[np.int64], clusters: Clusters
) -> None:
    for (task, points), style in zip(clusters.items(), STYLES, strict=False):
        x, y = np.asarray(points).T
        axes.scatter(x, y, s=5, alpha=0.35, label=task, color=style["color"])
    switches = np.flatnonzero(np.diff(states))
    few = np.linspace(0, len(switches) - 1, min(16, len(switches))).astype(int)
    for i in switches[few]:
        axes.plot(*path[i : i + 2].T, color="0.6", linewidth=0.5)
    for state, color in enumerate(("black", "firebrick")):
        own = path[states == state]
        if len(own):
            axes.plot(*own.T, color=color, linewidth=1.2, label=f"path, state {state}")
            axes.plot(*own[-1], "o", color=color, markersize=4)
    axes.plot(*path[0], "o", color="black", markersize=4, fillstyle="none")
    axes.set(xlabel="PC 1", ylabel="PC 2")
    axes.legend(fontsize=7, loc="lower right", framealpha=0.85, edgecolor="none")
