"""The runner, ``python -m benchmarks.speed``, and ``python -m benchmarks.speed report``."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from benchmarks.papers.report import Failure, progress
from benchmarks.speed import figure, report
from benchmarks.speed.harness import card, in_file_name
from benchmarks.speed.measure import Options
from benchmarks.speed.results import Json, Results, processor, read
from benchmarks.speed.runner import BENCHES, DTYPES, Plan, run

RESULTS = Path("benchmarks/results")
SECONDS, QUICK_SECONDS = 2.0, 0.02


@dataclass
class Speed:
    """Measure the library against what else PyTorch offers, in time and memory.

    Every result is checked; wrong results of the library fail the run. The JSON is written after
    each case: a run that was cut off, or another choice of cases, goes on with it, and any change
    of the code, the machine or the settings begins it anew. ``python -m benchmarks.speed report``
    draws it again.
    """

    benches: tuple[str, ...] = tuple(BENCHES)
    """What to measure; all by default."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the operands: float32, bfloat16 or float16."""
    threads: tuple[int, ...] | None = None
    """Numbers of threads, one run of all cases for each; 0 is as many as torch takes by itself.
    By default 1 and 0, and 1 with --quick and on a GPU."""
    seconds: float | None = None
    """For the rounds of each case, beside warm-up and checks; 2 by default."""
    quick: bool = False
    """Tiny shapes and few rounds, into a file of its own; tells that all works, not how fast."""
    compile: bool = True
    """Measure the fastest peer under torch.compile, too; never with --quick."""
    device: str = "cpu"
    """cpu or cuda."""
    fresh: bool = False
    """Measure all cases again."""
    output: Path | None = None
    """Folder for the JSON and the figure; benchmarks/results by default, figures with --quick."""

    def run(self, console: Console) -> int:
        """Measure all cases, print the table, write the JSON and the figure; the exit status."""
        plan = self._plan()
        groups = plan.groups()
        machine = card() if self.device == "cuda" else in_file_name(processor())
        kind = f"quick-{self.device}" if self.quick else f"{self.device}-{machine}"
        options = asdict(plan.options) | {"quick": self.quick}
        folder = _folder(self.output or (Path("figures") if self.quick else RESULTS))
        results = Results(folder / f"speed-{kind}.json", plan.device, options, self.fresh)
        if results.replaced:
            console.print(
                f"{results.path}: of another commit, machine or setting; replaced", soft_wrap=True
            )
        before = 0
        with progress(console) as bar:
            task = bar.add_task("", total=sum(len(plan.keys(group)) for group in groups))
            for step in run(plan, groups, results, lambda name: bar.update(task, description=name)):
                bar.advance(task)
                if step.new:
                    console.print(report.line(step.case), soft_wrap=True, highlight=False)
                before += step.case is not None and not step.new
        if before:
            console.print(f"{before} of the cases were measured before; --fresh measures all")
        return _show(results.record, results.path, console)

    def _plan(self) -> Plan:
        _among("--benches", self.benches, BENCHES)
        _among("--dtypes", self.dtypes, DTYPES)
        if self.device not in ("cpu", "cuda"):
            raise Failure(f"--device: expected cpu or cuda, got {self.device}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Failure("--device: expected cpu, since torch finds no GPU here, got cuda")
        seconds, threads = self.seconds, self.threads
        if seconds is None:
            seconds = QUICK_SECONDS if self.quick else SECONDS
        if not 0 < seconds < math.inf:
            raise Failure(f"--seconds: expected a number above 0, got {seconds:g}")
        if threads is None:
            threads = (1,) if self.quick or self.device == "cuda" else (1, 0)
        if not threads or min(threads) < 0:
            got = min(threads, default="none")
            raise Failure(f"--threads: expected numbers of at least 0, got {got}")
        return Plan(
            benches=self.benches,
            dtypes=self.dtypes,
            threads=list(dict.fromkeys(n or torch.get_num_threads() for n in threads)),
            quick=self.quick,
            device=torch.device(self.device),
            options=Options(seconds, self.compile and not self.quick),
        )


@dataclass
class Report:
    """Draw tables and figures again, from the JSON of runs alone."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The JSON, one or more; all of the CPU's by default."""
    readme: Path | None = None
    """A Markdown file whose table, between <!-- speed:begin --> and <!-- speed:end -->, is to be
    replaced by one of all these results."""

    def run(self, console: Console) -> int:
        """Print the tables, write the figures and the README's table; the exit status."""
        paths = self.results or committed()
        if not paths:
            raise Failure(f"report: expected JSON of runs, got no speed-cpu-*.json in {RESULTS}")
        records = [read(path) for path in paths]
        if self.readme is not None:
            report.write_readme(records, self.readme)
        return max(_show(*each, console) for each in zip(records, paths, strict=True))


def committed() -> tuple[Path, ...]:
    """The JSON of the CPUs, in the order of their names."""
    return tuple(sorted(RESULTS.glob("speed-cpu-*.json"), key=lambda path: path.stem))


def _show(record: Json, path: Path, console: Console) -> int:
    """Print the table and what is wrong; write the figure."""
    wide = Console(file=console.file, width=max(console.width, report.WIDTH))
    wide.print(report.table(record))
    for text in report.notes(record):
        console.print(text, soft_wrap=True, highlight=False)
    picture = path.with_suffix(".png")
    figure.draw(record).savefig(picture, dpi=150)
    console.print(f"{picture}\n{path}", soft_wrap=True, highlight=False)
    wrong = [report.title(case) for case in record["cases"] if not case["summary"]["correct"]]
    if wrong:
        raise Failure(f"the library's results are wrong in {len(wrong)} cases: {'; '.join(wrong)}")
    return 0


def _among(option: str, given: tuple[str, ...], known: dict[str, Any]) -> None:
    wrong = [name for name in given if name not in known]
    if wrong or not given:
        got = ", ".join(wrong) or "none"
        raise Failure(f"{option}: expected some of {', '.join(known)}, got {got}")


def _folder(path: Path) -> Path:
    """Make the folder, and fail now rather than after the first case."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise Failure(
            f"--output: expected a folder to write to, got {path}: {error.strerror}; choose another"
        ) from error
    return path


def main(args: list[str] | None = None) -> int:
    """Measure, or draw what was measured; return the exit status."""
    args = sys.argv[1:] if args is None else args
    redraw = args[:1] == ["report"]
    command: Callable[..., Any] = Report if redraw else Speed
    prog = f"python -m benchmarks.speed{' report' if redraw else ''}"
    chosen = tyro.cli(command, prog=prog, args=args[redraw:])
    try:
        return chosen.run(Console())
    except Failure as failure:
        Console(stderr=True).print(
            f"error: {failure}", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "interrupted: the cases measured are kept, and the same command goes on from there"
        )
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
