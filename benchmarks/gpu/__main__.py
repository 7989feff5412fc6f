"""The stages, one after another: ``python -m benchmarks.gpu``, or ``make gpu STAGE=bench`` for one.

Nothing but Python runs here until the library is built. Each stage is a process of its own, with a
limit of time, and its outcome is in the JSON as soon as it ends; a run that was cut off goes on
with the stages that have not passed with the library as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CASES = 200  # of each op, for each tool
LAST_LINES = 12


@dataclass(frozen=True)
class Stage:
    """Commands that run at the same time, and the seconds they may take."""

    commands: Sequence[Sequence[str]]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


def stages(arch: str) -> dict[str, Stage]:
    """All of them, in order; ``arch`` is the GPU's, as nvcc calls it."""
    python, cases = sys.executable, "python_tests/sanitizer_cases.py"
    pytest = [python, "-m", "pytest", "python_tests", "-rs", "--durations=5"]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    sanitizer = find_sanitizer() or "compute-sanitizer"
    build = {"NEUROMOD_CUDA": "1", "NEUROMOD_EMULATOR": "0", "NEUROMOD_CUDA_ARCHS": arch}
    return {
        "build": Stage([[python, "setup.py", "--quiet", "build_ext", "--inplace"]], 300, build),
        "tests": Stage([[*pytest, *parallel, "-m", "not full and not gpu", "-k", "cuda"]], 150),
        "stress": Stage([[*pytest, "-m", "gpu"]], 240),
        "sanitize": Stage(
            [
                [
                    sanitizer,
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "9",
                    python,
                    cases,
                    "cuda",
                    str(CASES),
                ]
                for tool in TOOLS
            ],
            150,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        "bench": Stage([[python, "-m", "benchmarks.gpu.bench"]], 300),
    }


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_stage(stage: Stage, limit: float, log: Path) -> Json:
    """Run the commands; what became of them.

    Each writes into a file beside ``log``, which stays.
    """
    start, processes = time.monotonic(), []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **stage.environment}
    for number, command in enumerate(stage.commands):
        path = log if number == 0 else log.with_name(f"{log.stem}-{number}{log.suffix}")
        with path.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        processes.append((process, path))
    statuses = []
    try:
        for process, _ in processes:
            left = max(0.0, limit - (time.monotonic() - start))
            try:
                statuses.append("passed" if process.wait(left) == 0 else "failed")
            except subprocess.TimeoutExpired:
                statuses.append("timed out")
    finally:  # an interrupt, too, ends what was begun
        for process, _ in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its children too: the group is its own
                process.wait()
    worst = next((s for s in ("timed out", "failed") if s in statuses), "passed")
    said = [anywhere(path.read_text(errors="replace")).splitlines() for _, path in processes]
    return {
        "status": worst,
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commands": [anywhere(" ".join(command)) for command in stage.commands],
        "statuses": statuses,
        "said": [lines[-LAST_LINES:] for lines in said],
    }


def anywhere(text: str) -> str:
    """A text without the places where this machine keeps things."""
    return text.replace(sys.executable, "python").replace(str(ROOT), ".").replace(sys.prefix, "…")


def code() -> str:
    """A digest of all that stages run: sources, tests, benchmarks and what was built."""
    digest = hashlib.sha256()
    for folder in ("csrc", "neuromod_ext", "python_tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".so", ".cu", ".cpp", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write(record: Json, path: Path) -> None:
    """Write the JSON in one step."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def run(chosen: dict[str, Stage], path: Path, seconds: float, again: bool, about: Json) -> int:
    """Run stages, build first; 1 if one of them did not pass.

    Args:
        chosen: The stages.
        path: The JSON.
        seconds: For all of them.
        again: Run also those that passed with this code.
        about: What the JSON says of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {}
    record = {"environment": about, "stages": record.get("stages", {})}
    end = time.monotonic() + seconds
    failed = False
    for name, stage in chosen.items():
        before = record["stages"].get(name, {})
        passed_before = before.get("status") == "passed" and before.get("code") == code()
        if passed_before and not again and name != "build":
            print(f"{name}: passed before, with this code", flush=True)
            continue
        limit = min(stage.limit, end - time.monotonic())
        if limit <= 1:
            print(f"{name}: no time left; run it by STAGE={name}", flush=True)
            failed = True
            continue
        print(f"{name}: at most {limit:.0f} s", flush=True)
        outcome = run_stage(stage, limit, logs / f"{name}.log")
        record["stages"][name] = outcome | {"code": code()}
        write(record, path)
        print(f"{name}: {outcome['status']} after {outcome['seconds']} s", flush=True)
        if outcome["status"] != "passed":
            print("\n".join("    " + line for lines in outcome["said"] for line in lines))
            failed = True
            if name == "build":
                break
    print(path)
    return int(failed)


def gpu() -> tuple[str, Json]:
    """The GPU's architecture, and what the JSON says of the machine.

    Raises:
        SystemExit: There is none.
    """
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"neuromod_ext: make gpu needs torch: {error}") from error
    if not torch.cuda.is_available():
        raise SystemExit("neuromod_ext: make gpu needs a CUDA GPU, and torch finds none here")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    about = {
        "device": torch.cuda.get_device_name(),
        "arch": arch,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
    }
    return arch, about


def main(args: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    names = list(stages(""))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("stage", nargs="*", help=f"some of {', '.join(names)}; all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages together")
    parser.add_argument("--fresh", action="store_true", help="also those that passed before")
    chosen = parser.parse_args(args)
    wrong = [name for name in chosen.stage if name not in names]
    if wrong:
        parser.error(f"expected stages among {', '.join(names)}, got {', '.join(wrong)}")
    arch, about = gpu()
    every = stages(arch)
    wanted = {name: every[name] for name in names if name == "build" or name in chosen.stage}
    from benchmarks.speed.harness import card

    path = RESULTS / f"gpu-{card()}.json"
    again = chosen.fresh or bool(chosen.stage)
    return run(wanted if chosen.stage else every, path, 60 * chosen.minutes, again, about)


if __name__ == "__main__":
    raise SystemExit(main())
