"""Similarities of tasks: matrices, trees, and the spread over all pairs of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from neuromod_ext.analysis import Clustering, SimilarityHistogram
from neuromod_ext.analysis._checks import scipy, similarity
from neuromod_ext.plotting._axes import STYLES, empty

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

_MOST_LABELS = 18  # on an axis


def plot_similarity(
    matrices: Mapping[str, Tensor], names: Sequence[str], *, title: str = ""
) -> Figure:
    """Draw similarity matrices of the same tasks side by side, in one scale of colours.

    Args:
        matrices: By what they show ("before training", say), [T, T] each. The diagonal, of ones, is
            left grey, so that the scale fits the rest.
        names: Of the tasks, [T].
        title: Stands above the figure.

    Returns:
        The figure; ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: There is no matplotlib.
        TypeError: A matrix is no floating tensor.
        ValueError: A matrix is not square, symmetric and finite, there is none, or names do not
            fit.
    """
    op = "plot_similarity"
    values = {what: _off_diagonal(op, what, matrix, names) for what, matrix in matrices.items()}
    if not values:
        raise ValueError(f"{op}: expected matrices, got none")
    bound = max(float(np.nanmax(np.abs(value))) for value in values.values())
    figure = empty(4.4 * len(values) + 0.9, 4.7, title)
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (what, value) in zip(panels, values.items(), strict=True):
        shown = _heat(axes, value, names, bound)
        axes.set_title(what, fontsize=10)
    figure.colorbar(shown, ax=list(panels), label="cosine similarity", shrink=0.82)
    return figure


def plot_similarity_tree(
    matrix: Tensor, tree: Clustering, names: Sequence[str], *, title: str = ""
) -> Figure:
    """Draw the tree of a clustering, and under it the similarities in the tree's order.

    Args:
        matrix: Similarity of all pairs of tasks, [T, T].
        tree: What :func:`neuromod_ext.analysis.cluster_tasks` made of it.
        names: Of the tasks, [T].
        title: Stands above the figure.

    Returns:
        The figure; ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: There is no matplotlib or no scipy.
        TypeError: The matrix is no floating tensor.
        ValueError: It is not square, symmetric and finite, or the tree or the names do not fit.
    """
    op = "plot_similarity_tree"
    values = _off_diagonal(op, "matrix", matrix, names)
    if len(tree.order) != len(values):
        raise ValueError(
            f"{op}: expected a tree of T = {len(values)} tasks, got one of {len(tree.order)}"
        )
    figure = empty(6.0, 7.6, title)
    above, below = figure.subplots(2, 1, height_ratios=(1, 3))
    drawn = scipy(op, "cluster.hierarchy").dendrogram(tree.linkage, no_plot=True)
    for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        above.plot(x, y, color=STYLES[0]["color"], linewidth=1.6)
    above.set(xlim=(0, 10 * len(values)), xticks=[], ylabel="cosine distance")  # scipy's x: 10 each
    above.set_ylim(bottom=min(0.0, float(tree.linkage[:, 2].min())))
    above.spines[["top", "right", "bottom"]].set_visible(False)
    ordered = values[np.ix_(tree.order, tree.order)]
    bound = float(np.nanmax(np.abs(values)))
    shown = _heat(below, ordered, [names[t] for t in tree.order], bound)
    below.set_aspect("auto")  # so that its columns stand under the feet of the tree
    if len(values) <= _MOST_LABELS // 2:
        for i, j in zip(*np.nonzero(~np.isnan(ordered)), strict=True):
            colour = "white" if abs(ordered[i, j]) > 0.7 * bound else "black"
            text = f"{ordered[i, j]:.2f}"
            below.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    figure.colorbar(shown, ax=below, label="cosine similarity", location="bottom", aspect=40)
    return figure


def plot_similarity_histogram(
    histograms: Mapping[str, SimilarityHistogram], *, title: str = ""
) -> Figure:
    """Draw how the similarities of intra and of inter pairs are spread, one panel above another.

    Args:
        histograms: By what they show, as :func:`neuromod_ext.analysis.similarity_histogram` counts
            them.
        title: Stands above the figure.

    Returns:
        The figure; ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: There is no matplotlib.
        ValueError: There is no histogram, or one without intra or inter pairs.
    """
    op = "plot_similarity_histogram"
    for what, histogram in histograms.items():
        if not (histogram.intra.any() and histogram.inter.any()):
            raise ValueError(f"{op}: expected intra and inter pairs in {what!r}, got none of one")
    if not histograms:
        raise ValueError(f"{op}: expected histograms, got none")
    figure = empty(6.4, 1.2 + 2.3 * len(histograms), title)
    panels = figure.subplots(len(histograms), 1, squeeze=False, sharex=True)[:, 0]
    names = ("intra: one task, two classes", "inter: two tasks, one class")
    for axes, (what, histogram) in zip(panels, histograms.items(), strict=True):
        edges = histogram.edges.numpy()
        for name, counts, style in zip(names, histogram[1:], STYLES, strict=False):
            density = counts.double() / counts.sum() / (edges[1] - edges[0])
            axes.stairs(density.numpy(), edges, fill=True, color=style["color"], alpha=0.3)
            axes.stairs(density.numpy(), edges, color=style["color"], linewidth=1.4, label=name)
        axes.set_title(what, fontsize=10)
        axes.set(xlim=(-1, 1), ylabel="density")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("cosine similarity of two points")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _off_diagonal(op: str, what: str, matrix: Tensor, names: Sequence[str]) -> NDArray[np.float64]:
    """The matrix with NaN on its diagonal."""
    values: NDArray[np.float64] = similarity(op, what, matrix).cpu().clone().numpy()
    if len(names) != len(values):
        raise ValueError(f"{op}: expected T = {len(values)} names, got {len(names)}")
    np.fill_diagonal(values, np.nan)
    return values


def _heat(axes: Axes, values: NDArray[np.float64], names: Sequence[str], bound: float) -> AxesImage:
    """Draw a matrix of values from -bound to bound, blue to red, its names where there is room."""
    from matplotlib import colormaps

    colours = colormaps["RdBu_r"].with_extremes(bad="0.75")
    shown = axes.imshow(values, cmap=colours, vmin=-bound, vmax=bound, interpolation="nearest")
    step = -(-len(names) // _MOST_LABELS)
    ticks: dict[str, Any] = {"ticks": range(0, len(names), step), "labels": names[::step]}
    axes.set_xticks(**ticks, rotation=90, fontsize=7.5)
    axes.set_yticks(**ticks, fontsize=7.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return shown
