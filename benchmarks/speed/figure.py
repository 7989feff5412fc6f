"""The figure of a run: how many times as fast as its best peer each case is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.speed.problem import BACKWARD, FORWARD
from benchmarks.speed.report import dtypes, label, thread_counts, where
from benchmarks.speed.results import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FASTER, SLOWER, OTHER = "#0072B2", "#D55E00", "#222222"  # Okabe and Ito's
ROW, LEAST_WIDTH = 0.2, 9.5  # inches
MOST_TICKS = 7
Places = dict[tuple[str, str], int]  # of a row, by bench and label


def draw(record: Json) -> Figure:
    """Bars from 1.0, to the right where the library is faster; a panel by dtype and direction."""
    places, headings = _layout(record)
    found = {(case["dtype"], case["direction"]) for case in record["cases"]}
    columns = [
        (d, way)
        for d in dtypes(record["cases"])
        for way in (FORWARD, BACKWARD)
        if (d, way) in found
    ]
    rows = len(places) + len(headings)
    size = (max(3.2 + 2.4 * len(columns), LEAST_WIDTH), 1.9 + ROW * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, max(len(columns), 1), sharey=True, sharex=True, squeeze=False)[0]
    for axes, (dtype, direction) in zip(panels, columns, strict=False):
        cases = [c for c in record["cases"] if (c["dtype"], c["direction"]) == (dtype, direction)]
        _panel(axes, cases, thread_counts(record), places)
        axes.set_title(f"{dtype}, {direction}", fontsize=9)
    first = panels[0]
    first.set_yticks(
        [*headings.values(), *places.values()], [*headings, *(shape for _, shape in places)]
    )
    for text, is_heading in zip(first.get_yticklabels(), [True] * len(headings), strict=False):
        text.set_fontweight("bold" if is_heading else "normal")
    first.set_ylim(rows - 0.4, -0.6)
    first.set_xscale("log", base=2)
    left, right = first.get_xlim()
    left, right = min(left, 0.7), max(right, 1.5)  # room on both sides of 1
    first.set_xlim(left, right)
    step = math.ceil(math.log2(right / left) / MOST_TICKS)
    powers = range(-step * 10, step * 10, step)
    first.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter(FuncFormatter(_tick))
    for axes in panels:
        axes.tick_params(labelsize=7.5, length=0)
    figure.suptitle("Times as fast as the fastest of all peers", fontsize=11)
    legend = {"loc": "outside lower center", "ncols": 5, "fontsize": 8, "frameon": False}
    figure.legend(handles=_legend(record), title=where(record), title_fontsize=8, **legend)
    return figure


def _tick(value: float, _: int) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


def _layout(record: Json) -> tuple[Places, dict[str, int]]:
    """The row of each bench and label, and of the heading of each bench."""
    places: Places = {}
    headings: dict[str, int] = {}
    keys = dict.fromkeys((case["bench"], label(case)) for case in record["cases"])
    for bench in dict.fromkeys(bench for bench, _ in keys):
        headings[bench] = len(places) + len(headings)
        for key in keys:
            if key[0] == bench:
                places[key] = len(places) + len(headings)
    return places, headings


def _panel(axes: Axes, cases: list[Json], threads: list[int], places: Places) -> None:
    """Bars of the cases at the least number of threads, circles of those at others."""
    for case in cases:
        ratio, y = case["summary"]["ratio"], places[case["bench"], label(case)]
        if ratio is None:
            axes.text(1, y, "  no result", fontsize=7, va="center", color=SLOWER)
        elif case["threads"] == threads[0]:
            color = FASTER if ratio >= 1 else SLOWER
            axes.barh(y, ratio - 1, left=1, height=0.66, color=color)
            low, high = case["summary"]["ratio_low"], case["summary"]["ratio_high"]
            axes.plot([low, high], [y, y], color=OTHER, linewidth=0.8)
        else:
            axes.plot(ratio, y, "o", mfc="white", mec=OTHER, markersize=3.5, mew=0.8)
        if case["goal"] is not None and case["threads"] == threads[0]:
            axes.plot([case["goal"]] * 2, [y - 0.42, y + 0.42], color=OTHER, linewidth=1.2)
    axes.axvline(1, color=OTHER, linewidth=0.8)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(record: Json) -> list[Any]:
    threads = thread_counts(record)
    shown = [
        Patch(color=FASTER, label=f"faster (threads: {threads[0] if threads else 0})"),
        Patch(color=SLOWER, label="slower"),
        Line2D([], [], color=OTHER, linewidth=0.8, label="by the 20 % and 80 % quantiles"),
        Line2D([], [], color=OTHER, marker="|", linestyle="", label="goal"),
    ]
    if threads[1:]:
        name = f"threads: {', '.join(map(str, threads[1:]))}"
        circle = {"mfc": "white", "mec": OTHER, "markersize": 4, "linestyle": ""}
        shown.append(Line2D([], [], marker="o", label=name, **circle))
    return shown
