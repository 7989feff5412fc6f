"""Learning tasks one after another, and what contexts hold of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from neuromod_ext.plotting._axes import STYLES, at_most, empty

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def plot_learning(
    names: Sequence[str], matrices: Mapping[str, ArrayLike], *, title: str = ""
) -> Figure:
    """Draw what is left of a stream of tasks: while it is learned, and task by task at its end.

    Args:
        names: Of the tasks, [T].
        matrices: By model, the accuracy matrix in percent, [T, T] (row i: after learning task i;
            ``100 * continual.accuracy_matrix(rows)``), or those of several seeds, [seeds, T, T]; a
            band is the range of the seeds.
        title: Stands above the figure.

    Returns:
        The figure, with the mean accuracy at the tasks learned so far on the left, and on the right
        the accuracy at each task at the end; ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: There is no matplotlib.
        ValueError: There is no model, more models than styles, or a matrix that does not fit.
    """
    op = "plot_learning"
    at_most(op, "models", len(matrices))
    tasks = len(names)
    figure = empty(9.6, 4.2, title)
    during, after = figure.subplots(1, 2, sharey=True)
    for (model, matrix), style in zip(matrices.items(), STYLES, strict=False):
        values = np.asarray(matrix, dtype=np.float64)
        values = values.reshape(-1, *values.shape[-2:])
        if values.shape[1:] != (tasks, tasks):
            raise ValueError(
                f"{op}: expected the matrix of {model!r} of shape [T, T] = [{tasks}, {tasks}], "
                f"got {list(values.shape[1:])}"
            )
        so_far = np.stack([values[:, i, : i + 1].mean(1) for i in range(tasks)], 1)
        for axes, x, y in (
            (during, np.arange(1, tasks + 1), so_far),
            (after, np.arange(tasks), values[:, -1]),
        ):
            axes.plot(x, y.mean(0), label=model, linewidth=1.9, **style)
            axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.16, lw=0)
    step = -(-tasks // 12)
    during.xaxis.get_major_locator().set_params(integer=True)
    during.set(xlabel="tasks learned", ylabel="accuracy (%)", ylim=(0, 100))
    during.set_title("mean over the tasks learned so far", fontsize=10)
    after.set_xticks(range(0, tasks, step), names[::step], rotation=45, ha="right", fontsize=8)
    after.set_title("each task, after the last", fontsize=10)
    for axes in (during, after):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *during.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    return figure


def plot_images(
    images: ArrayLike, rows: Sequence[str], columns: Sequence[str], *, title: str = ""
) -> Figure:
    """Draw grey images in a table, each in its own range, such as reconstructions.

    Args:
        images: [rows, columns, H, W].
        rows: Their names.
        columns: Their names.
        title: Stands above the figure.

    Returns:
        The figure; ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: There is no matplotlib.
        ValueError: The images do not fit the names, or there is none.
    """
    values = np.asarray(images, dtype=np.float64)
    if values.ndim != 4 or values.shape[:2] != (len(rows), len(columns)) or values.size == 0:
        raise ValueError(
            f"plot_images: expected images of shape [rows, columns, H, W] = [{len(rows)}, "
            f"{len(columns)}, H, W], none of them 0, got {list(values.shape)}"
        )
    figure = empty(0.8 + 1.15 * len(columns), 0.6 + 1.2 * len(rows), title)
    table = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row, name in zip(table, values, rows, strict=True):
        for axes, image in zip(line, row, strict=True):
            axes.imshow(image, cmap="gray", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    for axes, name in zip(table[0], columns, strict=True):
        axes.set_title(name, fontsize=9)
    return figure
