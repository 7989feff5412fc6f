"""The runner, ``python -m benchmarks.papers EXPERIMENT``; an experiment is one line here."""

from __future__ import annotations

import tyro
from rich.console import Console

from benchmarks.papers.random_weights import RandomWeights
from benchmarks.papers.report import Failure
from benchmarks.papers.rotated import Rotated
from benchmarks.papers.switch import SwitchedGates
from benchmarks.papers.switch_mnist import SwitchedDigits

EXPERIMENTS = {
    "rotated": Rotated,
    "switch": SwitchedGates,
    "random-weights": RandomWeights,
    "switch-classes": SwitchedDigits,
}


def main(args: list[str] | None = None) -> int:
    """Run one experiment; return the exit status."""
    experiment = tyro.extras.subcommand_cli_from_dict(
        EXPERIMENTS,
        prog="python -m benchmarks.papers",
        description="Experiments of the papers; each writes figures and a JSON with all numbers.",
        args=args,
    )
    try:
        experiment.run(Console())
    except Failure as failure:
        Console(stderr=True).print(
            f"error: {failure}", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        left = getattr(experiment, "if_interrupted", "nothing was written")
        Console(stderr=True).print(f"interrupted: {left}")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
