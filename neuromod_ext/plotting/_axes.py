"""Empty figures, and the colours of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, each with a dash of its own.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": (0, (5, 1.2))},
    {"color": "#009E73", "linestyle": (0, (6, 1.2, 1.2, 1.2))},
    {"color": "#555555", "linestyle": (0, (1.2, 1.2))},
    {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    {"color": "#E69F00", "linestyle": (0, (2.5, 1))},
)


def empty(width: float, height: float, title: str = "") -> Figure:
    """An empty figure, in inches, that no window and no global state knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "neuromod_ext.plotting: expected matplotlib, got none; pip install neuromod_ext[papers]"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def single(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure with axes for lines."""
    figure = empty(width, height)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def at_most(op: str, what: str, count: int) -> None:
    """As many as there are styles, and at least one."""
    if not 1 <= count <= len(STYLES):
        raise ValueError(f"{op}: expected 1 to {len(STYLES)} {what}, got {count}")
