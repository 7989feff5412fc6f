"""Logic gates under a fixed affine switch: where they lie, and which pairs one network learns.

The experiments of "Neuromodulator-inspired task switching using a fixed weight-space
transformation" on AND, OR, XOR and NOR. Hidden sizes, learning rate, the distributions of M and v,
and the loss (mean squared error) are our choice: the paper does not state them.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.papers import report
from benchmarks.papers.gates import (
    GATES,
    Cycle,
    Kind,
    Runs,
    Sizes,
    Switch,
    co_optimise,
    forward,
    four_layers,
    right,
    train,
    two_layers,
)
from neuromod_ext.analysis.switch import pair_distances, success_interval, switch_peaks
from neuromod_ext.plotting import principal_components
from neuromod_ext.plotting import switch as plotting

Scheme = Literal["alternating", "joint"]
PERIODS = (3, 10, 30)
PATH = 2000  # epochs of the path that the figure draws
WAYS: tuple[tuple[Kind, Scheme], ...] = (
    ("orthogonal", "alternating"),
    ("dense", "alternating"),
    ("dense", "joint"),
)
SHOWN = 300  # pairs of networks whose distances the JSON keeps


@dataclass
class SwitchedGates:
    """Logic gates: the paper's map of tasks, AND/OR at three periods, AND/XOR.

    'map' trains networks for one gate each and shows where they lie; 'and-or' co-optimises one
    network for two gates on either side of a fixed modulator; 'and-xor' counts how often that
    succeeds, and what raises it. All starts train as one batched computation.
    """

    part: Literal["map", "and-or", "and-xor"] = "and-or"
    """Which experiment."""
    starts: int = 100
    """Starts, each with a modulator of its own."""
    epochs: int = 1000
    """Epochs of networks trained for one gate."""
    cycles: int = 500
    """Cycles of co-optimisation."""
    hidden: int = 4
    """Hidden units of a layer (and-xor: 2, 4 and 8)."""
    lr: float = 0.3
    """Learning rate of gradient descent."""
    threads: int = 1
    """Threads of torch."""
    out: Path = Path("figures")
    """Folder for the figures and the JSON."""

    def run(self, console: Console) -> None:
        """Train all starts, print the table, write the figure and the JSON."""
        start = time.perf_counter()
        self._check()
        report.prepare(self.out)
        torch.set_num_threads(self.threads)
        record: dict[str, Any] = {
            "experiment": "switch",
            "stem": f"switch-{self.part}",
            "config": {n: v for n, v in asdict(self).items() if n != "out"},
            "environment": report.environment(),
        }
        parts = {"map": self._map, "and-or": self._and_or, "and-xor": self._and_xor}
        sheet, figure = parts[self.part](record, console)
        record["seconds"] = time.perf_counter() - start
        console.print(sheet)
        for path in report.write(record, {"figure": figure}, self.out):
            console.print(str(path), soft_wrap=True)

    def _check(self) -> None:
        for name in ("starts", "epochs", "cycles", "hidden", "threads"):
            if getattr(self, name) < 1:
                raise report.Failure(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise report.Failure(f"--lr: expected a number above 0, got {self.lr}")
        if self.part == "map" and self.starts < 2:
            raise report.Failure("--starts: expected at least 2 with map, got 1")

    def _trained(self, sizes: Sizes, gate: str) -> tuple[Tensor, Tensor]:
        """Parameters of networks trained for one gate, and the shares right of each."""
        runs = Runs.start(sizes, self.starts, seed=1000 * list(GATES).index(gate))
        for _ in train(runs, GATES[gate], self.epochs, self.lr):
            pass
        return runs.parameters(), right(forward(sizes, runs.w, runs.b), GATES[gate])

    def _map(self, record: dict[str, Any], console: Console) -> tuple[Table, Any]:
        kinds = {"two layers": two_layers(self.hidden), "four layers": four_layers(self.hidden)}
        sheet = _table("Networks trained for one gate", "", "gate or pair", "success %", "cosine",
                       "Euclidean")  # fmt: skip
        drawn, record["networks"] = {}, {}
        for kind, sizes in kinds.items():
            trained = {gate: self._trained(sizes, gate) for gate in GATES}
            points = {gate: parameters for gate, (parameters, _) in trained.items()}
            space, share = principal_components(torch.cat(list(points.values())), 3)
            clusters = dict(zip(GATES, space.split(self.starts), strict=True))
            numbers = record["networks"][kind] = {
                "units": sizes.units,
                "variance_shares": share.tolist(),
                "components": {g: _rounded(c) for g, c in clusters.items()},
                "success": {},
                "distances": {},
            }
            for gate, (parameters, shares) in trained.items():
                numbers["success"][gate] = _rate(shares == 1)
                self._distances(sheet, numbers, kind, gate, parameters, None)
            for one, other in (("AND", "OR"), ("AND", "XOR"), ("AND", "NOR"), ("OR", "XOR")):
                name = f"{one} to {other}"
                self._distances(sheet, numbers, kind, name, points[one], points[other])
            pairs = [name for name in numbers["distances"] if " to " in name]
            drawn[f"{kind}, {sizes.units}"] = (
                clusters,
                {name: numbers["distances"][name]["cosine"] for name in pairs},
                {name: numbers["distances"][name]["euclidean"] for name in pairs},
            )
        title = f"{self.starts} networks for each gate after {self.epochs} epochs"
        return sheet, plotting.plot_task_structure(drawn, title=title)

    def _distances(
        self,
        sheet: Table,
        numbers: dict[str, Any],
        kind: str,
        name: str,
        one: Tensor,
        other: Tensor | None,
    ) -> None:
        found = pair_distances(one, other)
        step = max(1, len(found.cosine) // SHOWN)
        quantiles = {}
        for key, values in found._asdict().items():
            low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
            quantiles[key] = {"quantiles_10_50_90": [low, middle, high]}
        numbers["distances"][name] = {
            "summary": quantiles,
            "cosine": _rounded(found.cosine[::step]),
            "euclidean": _rounded(found.euclidean[::step]),
        }
        cells = (
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*quantiles[key]["quantiles_10_50_90"])
            for key in ("cosine", "euclidean")
        )
        success = numbers["success"].get(name)
        sheet.add_row(kind, name, "" if success is None else _percent(success), *cells)

    def _co_optimised(
        self,
        gates: tuple[str, str],
        sizes: Sizes,
        kind: Kind,
        period: int,
        scheme: Scheme = "alternating",
    ) -> tuple[dict[str, Any], list[Cycle]]:
        """Numbers of one setting; of all cycles, what the figure shows."""
        runs = Runs.start(sizes, self.starts)
        switch = Switch.draw(kind, sizes, self.starts)
        tables = [GATES[gate] for gate in gates]
        cycles = list(
            co_optimise(
                runs, switch, tables, period=period, cycles=self.cycles, lr=self.lr, scheme=scheme
            )
        )
        peaks = switch_peaks(torch.stack([cycle.losses for cycle in cycles]))
        both = torch.stack([cycle.right for cycle in cycles]).amin(1) == 1  # [cycles, R]
        left = torch.stack([cycle.left for cycle in cycles]).amin(1) == 1
        solved = peaks[:, :, both[-1]] if both[-1].any() else peaks
        tail = max(1, self.cycles // 10)
        numbers = {
            "gates": gates,
            "units": sizes.units,
            "modulator": kind,
            "period": period,
            "scheme": scheme,
            "success": _rate(both[-1]),
            "success_of_each_gate_after_its_own_period": _rate(left[-1]),
            "success_by_cycle": _rounded(both.double().mean(1)),
            "accuracy_by_cycle": _rounded(torch.stack([c.right.mean(1) for c in cycles])),
            "peak_after_switch": {
                "median_by_cycle": _rounded(peaks.median(-1).values),
                "mean_of_last_tenth": _rounded(peaks[-tail:].mean((0, 2))),
                "mean_of_last_tenth_of_solved": _rounded(solved[-tail:].mean((0, 2))),
                "cycle_10_median": _rounded(peaks[min(9, len(peaks) - 1)].median(-1).values),
            },
            "cycles_to_success_median": _first(both),
        }
        return numbers, cycles

    def _and_or(self, record: dict[str, Any], console: Console) -> tuple[Table, Any]:
        sizes = two_layers(self.hidden)
        clusters = {gate: self._trained(sizes, gate)[0] for gate in GATES}
        everything = torch.cat(list(clusters.values()))
        sheet = _table("AND/OR", "modulator", "scheme", "period", "success %", "cycles",
                       "peak, cycle 10", "peak, last tenth")  # fmt: skip
        record["settings"], drawn = [], {}
        for kind, scheme in WAYS:
            for period in PERIODS:
                numbers, cycles = self._co_optimised(("AND", "OR"), sizes, kind, period, scheme)
                record["settings"].append(numbers)
                sheet.add_row(kind, scheme, str(period), *_cells(numbers))
                if kind == "orthogonal":
                    path = torch.cat([cycle.path for cycle in cycles])[:PATH]
                    plane, _ = principal_components(torch.cat((everything, path)), 2)
                    parts = plane[: len(everything)].split(self.starts)
                    losses = torch.cat([c.losses[:, :, 0].flatten() for c in cycles])
                    drawn[f"period {period}"] = {
                        "path": plane[len(everything) :],
                        "states": torch.arange(len(path)) // period % 2,
                        "losses": losses[:PATH],
                        "peaks": numbers["peak_after_switch"]["median_by_cycle"],
                        "success": numbers["success_by_cycle"],
                    }
                    projected = dict(zip(clusters, parts, strict=True))
        title = f"AND/OR, orthogonal M, {self.starts} starts; the path of one of them"
        figure = plotting.plot_co_optimisation(drawn, projected, ("AND", "OR"), title=title)
        return sheet, figure

    def _and_xor(self, record: dict[str, Any], console: Console) -> tuple[Table, Any]:
        sheet = _table("AND/XOR", "network", "modulator", "scheme", "success %", "cycles",
                       "peak, cycle 10", "peak, last tenth")  # fmt: skip
        record["settings"], record["unmodulated"], rates = [], {}, {}
        for layers in (two_layers, four_layers):
            for hidden in (2, 4, 8):
                sizes = layers(hidden)
                units = "-".join(map(str, sizes.units))
                alone = _rate(self._trained(sizes, "XOR")[1] == 1)
                record["unmodulated"][units] = alone
                rates[f"{units}, XOR alone"] = _shown(alone)
                sheet.add_row(units, "XOR alone", "", _percent(alone), "", "", "")
                for kind in ("dense", "orthogonal"):
                    for scheme in ("alternating", "joint"):
                        numbers, _ = self._co_optimised(("AND", "XOR"), sizes, kind, 10, scheme)
                        record["settings"].append(numbers)
                        sheet.add_row(units, kind, scheme, *_cells(numbers))
                        rates[f"{units}, {kind}, {scheme}"] = _shown(numbers["success"])
        title = f"AND/XOR, {self.starts} starts, period 10, 95 % intervals"
        return sheet, plotting.plot_success(rates, title=title)


def _rate(successes: Tensor) -> dict[str, float]:
    count, runs = int(successes.sum()), len(successes)
    low, high = success_interval(count, runs)
    return {"rate": count / runs, "low_95": low, "high_95": high, "runs": runs}


def _shown(rate: dict[str, float]) -> tuple[float, float, float]:
    return 100 * rate["rate"], 100 * rate["low_95"], 100 * rate["high_95"]


def _percent(rate: dict[str, float]) -> str:
    return "{:.0f} ({:.0f} to {:.0f})".format(*_shown(rate))


def _cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    peaks = numbers["peak_after_switch"]
    first = numbers["cycles_to_success_median"]
    return (
        _percent(numbers["success"]),
        "" if first is None else f"{first:.0f}",
        *(
            " / ".join(f"{peak:.2g}" for peak in peaks[key])
            for key in ("cycle_10_median", "mean_of_last_tenth")
        ),
    )


def _first(both: Tensor) -> float | None:
    """Of the runs that are right at the end, the median of the cycles from which on they are."""
    wrong = (~both).flip(0).cumsum(0).flip(0) > 0  # wrong now or later
    cycles = wrong.sum(0)[both[-1]].double() + 1
    return float(cycles.median()) if len(cycles) else None


def _rounded(values: Tensor) -> Any:
    return [_rounded(row) for row in values] if values.dim() > 1 else [
        float(f"{value:.5g}") for value in values.tolist()
    ]  # fmt: skip


def _table(title: str, *columns: str) -> Table:
    sheet = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        sheet.add_column(column, overflow="fold")
    return sheet
