"""The stages, one after another: ``python -m benchmarks.gpu``, or ``make gpu STAGE=bench`` for one.

Nothing but Python runs here until the library is built. Each stage is a process of its own, with a
limit of time, and its outcome is in the JSON as soon as it ends; a run that was cut off goes on
with the commands that have not passed with the library as it is.
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
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CASES = 200  # of each op, for each tool
LAST_LINES = 12
MINUTES = 9.5  # for all stages: ten with what make does before
WORST = ("timed out", "failed", "skipped")  # of a stage's commands


@dataclass(frozen=True)
class Stage:
    """Commands that run at the same time.

    Attributes:
        commands: Words of each.
        limit: The seconds they may take, and more where the stages after it leave some.
        environment: Variables.
        lacking: Why none can run here, if so.
        unsupported: What a command says, in lower case, that cannot do its work here.
        results: The JSON that it leaves, which the driver's takes in.
    """

    commands: Sequence[Sequence[str]]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    lacking: str = ""
    unsupported: str = ""
    results: Path | None = None


def stages(arch: str, card: str = "") -> dict[str, Stage]:
    """All of them, in order; ``arch`` is the GPU's, as nvcc calls it, ``card`` as files do."""
    python, sanitizer = sys.executable, find_sanitizer()
    pytest = [python, "-m", "pytest", "-rs", "--durations=5"]
    xdist = importlib.util.find_spec("xdist") is not None  # it outlives a process that lost the GPU
    parallel, alone = (["-n", "8"], ["-n", "1"]) if xdist else ([], [])
    stress = [*pytest, *alone, "python_tests/test_gpu.py", "-k"]
    watched = [python, "python_tests/sanitizer_cases.py", "cuda", str(CASES)]
    watch = [sanitizer or "compute-sanitizer", "--error-exitcode", "9", "--tool"]
    slow = "derivatives or opcheck or compile"
    return {
        "build": Stage(
            [[python, "setup.py", "--quiet", "build_ext", "--inplace"]],
            180,
            {"NEUROMOD_CUDA": "1", "NEUROMOD_EMULATOR": "0", "NEUROMOD_CUDA_ARCHS": arch},
        ),
        "tests": Stage(
            [[*pytest, *parallel, "python_tests", "--backend", "cuda", "-m", "not full"]], 80
        ),
        "bench": Stage(
            [[python, "-m", "benchmarks.gpu.bench"]],
            135,
            results=RESULTS / f"speed-cuda-{card}.json",
        ),
        "plans": Stage(
            [[python, "-m", "benchmarks.speed.cuda_plan_costs"]],
            35,
            results=RESULTS / f"plans-cuda-{card}.json",
        ),
        "stress": Stage(
            [[*stress, "huge"], [*stress, slow], [*stress, f"not (huge or {slow})"]], 80
        ),
        "sanitize": Stage(
            [[*watch, tool, *watched] for tool in TOOLS],
            60,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "" if sanitizer else "there is no compute-sanitizer on the PATH or in the CUDA toolkit",
            "device not supported",
        ),
    }


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_stage(stage: Stage, limit: float, log: Path) -> list[Json]:
    """Run the commands; what became of each.

    Each writes into a file beside ``log``, which stays.
    """
    if stage.lacking:
        return [outcome(command, "skipped", [stage.lacking]) for command in stage.commands]
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
    outcomes = []
    for command, status, (_, path) in zip(stage.commands, statuses, processes, strict=True):
        said = anywhere(path.read_text(errors="replace")).splitlines()
        why = [line for line in said if stage.unsupported and stage.unsupported in line.lower()]
        if why:  # whatever the status: what was to be watched was not
            outcomes.append(outcome(command, "skipped", why[:1]))
        else:
            outcomes.append(outcome(command, status, said[-LAST_LINES:]))
    return outcomes


def outcome(command: Sequence[str], status: str, said: list[str]) -> Json:
    """What became of a command, as the JSON has it."""
    return {"command": shown(command), "status": status, "said": said}


def shown(command: Sequence[str]) -> str:
    """A command as one text."""
    return anywhere(" ".join(command))


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
    """Run stages, build first; 1 if one of them failed.

    Args:
        chosen: The stages.
        path: The JSON.
        seconds: For all of them.
        again: Run also the commands that passed with this code.
        about: What the JSON says of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {}
    record = {"environment": about, "stages": record.get("stages", {})}
    end, reserved = time.monotonic() + seconds, sum(stage.limit for stage in chosen.values())
    failed = False
    for name, stage in chosen.items():
        reserved -= stage.limit
        passed = [] if again or name == "build" else passed_before(record["stages"].get(name, {}))
        known = [each["command"] for each in passed]
        stage = replace(stage, commands=[c for c in stage.commands if shown(c) not in known])
        if not stage.commands:
            print(f"{name}: passed before, with this code (--fresh runs it again)", flush=True)
            continue
        left = end - time.monotonic()
        limit = min(left, max(stage.limit, left - reserved))
        if limit <= 1:
            print(f"{name}: no time left; run it by STAGE={name}", flush=True)
            failed = True
            continue
        print(f"{name}: at most {limit:.0f} s", flush=True)
        start = time.monotonic()
        outcomes = run_stage(stage, limit, logs / f"{name}.log")
        taken = round(time.monotonic() - start, 1)
        statuses = [each["status"] for each in outcomes]
        status = next((s for s in WORST if s in statuses), "passed")
        record["stages"][name] = {
            "status": status,
            "seconds": taken,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "code": code(),
            "commands": [*passed, *outcomes],
        }
        if stage.results is not None and stage.results.exists():
            record["stages"][name]["results"] = json.loads(stage.results.read_text())
        write(record, path)
        print(f"{name}: {status} after {taken} s", flush=True)
        for each in outcomes:
            if each["status"] != "passed":
                print("\n".join("    " + line for line in (each["command"], *each["said"])))
        failed |= status in ("timed out", "failed")
        if failed and name == "build":
            break
    print(summary(record["stages"], list(chosen)))
    print(path)
    return int(failed)


def summary(found: Json, chosen: Sequence[str]) -> str:
    """The table of the stages: how each ended, when, and how many of its commands passed."""
    lines = [f"{'stage':10} {'status':10} {'seconds':>8} {'passed':>7}  of"]
    for name in chosen:
        stage = found.get(name, {"status": "not run", "seconds": 0, "commands": []})
        passed = sum(each["status"] == "passed" for each in stage["commands"])
        counts = f"{stage['seconds']:8.1f} {passed:7}  {len(stage['commands'])}"
        lines.append(f"{name:10} {stage['status']:10} {counts}")
    return "\n".join(lines)


def passed_before(stage: Json) -> list[Json]:
    """The commands of an earlier run that passed, if it ran this code."""
    commands = stage.get("commands", []) if stage.get("code") == code() else []
    return [command for command in commands if command["status"] == "passed"]


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
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages")
    parser.add_argument("--fresh", action="store_true", help="also those that passed before")
    chosen = parser.parse_args(args)
    wrong = [name for name in chosen.stage if name not in names]
    if wrong:
        parser.error(f"expected stages among {', '.join(names)}, got {', '.join(wrong)}")
    arch, about = gpu()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an interrupt: it ends what was begun
    named = ("build", *chosen.stage) if chosen.stage else names
    from benchmarks.speed.harness import card

    wanted = {name: stage for name, stage in stages(arch, card()).items() if name in named}
    path = RESULTS / f"gpu-{card()}.json"
    return run(wanted, path, 60 * chosen.minutes, chosen.fresh, about)


if __name__ == "__main__":
    raise SystemExit(main())
