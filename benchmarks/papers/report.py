"""What every experiment shows and keeps: progress, intervals, its machine, one JSON per run."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy import stats

import neuromod_ext

Array = np.ndarray[Any, Any]


class Failure(Exception):
    """What a user can mend; the runner prints it as one line."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t-interval, mean ± half; half is NaN with one seed."""

    mean: Array
    half: Array

    def __format__(self, sign: str) -> str:
        plus_minus = "" if np.isnan(self.half) else f" ± {self.half:.1f}"
        return f"{self.mean:{sign}.1f}{plus_minus}"


def interval(values: Any) -> Interval:
    """Mean and 95 % t-interval over the first dimension, the seeds."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 1:
        return Interval(values[0], np.full_like(values[0], np.nan))
    half = stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n)
    return Interval(values.mean(0), half)


def progress(console: Console) -> Progress:
    """A bar with the time left; silent where nobody watches, who reads lines instead."""
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )


def prepare(folder: Path) -> Path:
    """Make the folder for the results, and fail now rather than after the training.

    Raises:
        Failure: Nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Failure(
            f"--out: expected a folder to write to, got {folder}: {error.strerror}; choose another"
        ) from error
    return folder


def by_model(record: dict[str, Any], key: str) -> dict[str, Array]:
    """One entry of all runs of a record: [seeds, ...] for each model."""
    names = dict.fromkeys(run["model"] for run in record["runs"])
    return {n: np.array([run[key] for run in record["runs"] if run["model"] == n]) for n in names}


def write(record: dict[str, Any], figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write figures and the record as JSON, named after experiment and data; return their paths."""
    path = folder / f"{stem(record)}.json"
    path.write_text(json.dumps(record, indent=1, default=plain, allow_nan=False) + "\n")
    return [*save(record, figures, folder), path]


def save(record: dict[str, Any], figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write the figures of a record, named after experiment and data; return their paths."""
    paths = [folder / f"{stem(record)}-{name}.png" for name in figures]
    for figure, path in zip(figures.values(), paths, strict=True):
        figure.savefig(path, dpi=200, bbox_inches="tight")
    return paths


def stem(record: dict[str, Any]) -> str:
    """What the names of a record's files begin with."""
    return record.get("stem") or f"{record['experiment']}-{record['config']['data']}"


def environment() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "neuromod_ext": neuromod_ext.__version__,
        "commit": _commit(),
    }


def plain(value: Any) -> Any:
    """What JSON has no form for."""
    if isinstance(value, Interval):
        half = None if np.isnan(value.half) else float(value.half)
        return {"mean": float(value.mean), "half_width_95": half}
    return str(value) if isinstance(value, Path) else value.tolist()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _commit() -> str | None:
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
