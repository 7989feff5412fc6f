"""What a run's JSON comes to: the table, worst case first, and the README's table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks.papers.report import Failure
from benchmarks.speed.problem import BACKWARD, FORWARD
from benchmarks.speed.results import Json

WIDTH = 160  # of the table
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
SHORT = {FORWARD: "forward", BACKWARD: "fwd+bwd", "float32": "f32", "bfloat16": "bf16"}


def label(case: Json) -> str:
    """Shape and note of a case."""
    sizes = " ".join(f"{letter}{size}" for letter, size in case["shape"].items())
    return f"{sizes} {case['note']}".strip()


def title(case: Json) -> str:
    """A case in words."""
    return (
        f"{case['bench']} {label(case)} {case['dtype']} {case['direction']}, "
        f"threads: {case['threads']}"
    )


def line(case: Json) -> str:
    """A case's outcome in one line."""
    summary = case["summary"]
    if not summary["correct"]:
        return f"{title(case)}: WRONG"
    if summary["ratio"] is None:
        return f"{title(case)}: no peer ran"
    return f"{title(case)}: {summary['ratio']:.2f} × {summary['best_peer']}"


def _by_ratio(cases: Iterable[Json]) -> list[Json]:
    """The wrong first, then the slowest against its best peer."""
    return sorted(cases, key=lambda case: case["summary"]["ratio"] or 0.0)


def table(record: Json) -> Table:
    """All cases, for a terminal of WIDTH columns."""
    sheet = Table(
        title="Speed against the best peer, worst case first",
        caption="× best: how many times as fast as the fastest correct peer, by medians. % limit: "
        "the time in which this machine multiplies, or moves, as much, by the library's time. "
        "× plain: the library's time by the plain layer's. MiB: peak memory of a call, the "
        "library's and that peer's.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    for name in ("case", "dtype", "thr", "direction"):
        sheet.add_column(name, no_wrap=True)
    for name in ("time", "× best", "goal"):
        sheet.add_column(name, justify="right", no_wrap=True)
    sheet.add_column("best peer", no_wrap=True)
    for name in ("% limit", "× plain", "MiB"):
        sheet.add_column(name, justify="right", no_wrap=True)
    for case in _by_ratio(record["cases"]):
        sheet.add_row(*_cells(case), style=_style(case))
    return sheet


def _cells(case: Json) -> list[str]:
    summary = case["summary"]
    variants = {variant["name"]: variant for variant in case["variants"]}
    ours = next(v for v in case["variants"] if v["role"] == "ours")
    peer = variants.get(summary["best_peer"], {})
    ratio = _number(summary["ratio"], ".2f") if summary["correct"] else "WRONG"
    return [
        f"{case['bench']} {label(case)}",
        SHORT.get(case["dtype"], case["dtype"]),
        str(case["threads"]),
        SHORT[case["direction"]],
        _time(ours["seconds"]["median"]) if "seconds" in ours else "",
        ratio,
        _number(case["goal"], "g"),
        summary["best_peer"] or "",
        _number(summary["of_limit"] and 100 * summary["of_limit"], ".0f"),
        _number(summary["of_plain"], ".2f"),
        f"{_memory(ours)} / {_memory(peer)}",
    ]


def _style(case: Json) -> str:
    ratio = case["summary"]["ratio"]
    if ratio is None or ratio < 1:
        return "red"
    return "yellow" if case["goal"] is not None and ratio < case["goal"] else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _memory(variant: Json) -> str:
    peak = variant.get("peak_bytes")
    return "–" if peak is None else f"{peak / 2**20:.{1 if peak < 100 * 2**20 else 0}f}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def notes(record: Json) -> list[str]:
    """How many cases win, what was left out, and where it was measured."""
    found = []
    for threads in thread_counts(record):
        cases = [c for c in record["cases"] if c["threads"] == threads]
        ratios = [c["summary"]["ratio"] for c in cases if c["summary"]["ratio"]]
        if ratios:
            met = sum((c["summary"]["ratio"] or 0) >= (c["goal"] or 0) for c in cases)
            found.append(
                f"threads: {threads}: faster than the best peer in {sum(r > 1 for r in ratios)} of "
                f"{len(cases)} cases, geometric mean {_mean(ratios):.2f}; {met} reach their goal"
            )
    for entry in record["skipped"]:
        found.append(
            f"left out: {entry['bench']} {label(entry)} {entry['dtype']}: {entry['reason']}"
        )
    return [*found, where(record)]


def where(record: Json) -> str:
    """The machine and the versions."""
    here = record["environment"]
    commit = (here["commit"] or "unknown")[:12] + (" with changes" if here["dirty"] else "")
    kernels = "" if here["kernels"] == "compiled" else ", its kernels missing"
    return (
        f"{here['device']}, {here['cores']} cores; torch {here['torch']}, Python "
        f"{here['python']}, neuromod_ext {here['neuromod_ext']} at commit {commit}"
        f"{kernels}, {here['date'][:10]}"
    )


def thread_counts(record: Json) -> list[int]:
    """The numbers of threads of the run."""
    return sorted({case["threads"] for case in record["cases"]})


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def dtypes(cases: Iterable[Json]) -> list[str]:
    """Theirs, in the same order whichever was measured first."""
    order = ("float32", "bfloat16", "float16", "float64")
    return sorted({case["dtype"] for case in cases}, key=order.index)


def markdown(records: Sequence[Json]) -> str:
    """The README's table: every case of each run at its least number of threads."""
    marks = [f"{chr(ord('A') + i)} " if len(records) > 1 else "" for i in range(len(records))]
    heads: dict[str, None] = {}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    where_from = []
    for mark, record in zip(marks, records, strict=True):
        number = thread_counts(record)[0]
        cases = [case for case in record["cases"] if case["threads"] == number]
        for dtype in dtypes(cases):
            heads |= dict.fromkeys(_head(mark, dtype, way) for way in (FORWARD, BACKWARD))
        for case in cases:
            cells = rows.setdefault((case["bench"], label(case)), {})
            cells[_head(mark, case["dtype"], case["direction"])] = _cell(case)
        where_from.append(f"- {mark and mark[:-1] + ': '}{where(record)}; threads: {number}")
    lines = [f"| op | shape | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"]
    for (bench, shape), cells in rows.items():
        entries = " | ".join(cells.get(head, "") for head in heads)
        lines.append(f"| {bench} | {shape} | {entries} |")
    said = "Times as fast as the fastest of all peers; losses are bold. Measured on"
    return "\n".join([said, "", *where_from, "", *lines])


def _head(mark: str, dtype: str, direction: str) -> str:
    return f"{mark}{SHORT.get(dtype, dtype)} {SHORT[direction]}"


def _cell(case: Json) -> str:
    ratio = case["summary"]["ratio"]
    if ratio is None:
        return "wrong" if not case["summary"]["correct"] else "–"
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def write_readme(records: Sequence[Json], path: Path) -> None:
    """Replace what is between the markers by the table.

    Raises:
        Failure: There is no such file, or it has no markers.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise Failure(f"--readme: expected a file, got {path}: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Failure(f"--readme: expected {BEGIN} and {END} in the file, got {path} without them")
    path.write_text(f"{before}{BEGIN}\n\n{markdown(records)}\n\n{END}{after}")
