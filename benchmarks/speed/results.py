"""The JSON of a run: cases are added as they are measured, and a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import neuromod_ext
from benchmarks.papers.report import Failure, environment
from neuromod_ext import _ops

Json = dict[str, Any]
KEY = ("bench", "shape", "note", "dtype", "direction", "threads")
PARTS = ("environment", "options", "skipped", "cases")


class Results:
    """What was measured so far, on disk after every case.

    Attributes:
        path: The file.
        record: "environment" (machine, versions, commit), "options", "skipped" (what this version
            lacks) and "cases".
        replaced: Whether the file held results of another commit, machine or setting, which go.
    """

    def __init__(self, path: Path, device: torch.device, options: Json, fresh: bool) -> None:
        self.path = path
        here = machine(device)
        self.record: Json = {"environment": here, "options": options, "skipped": [], "cases": []}
        self.replaced = False
        if not path.exists():
            return
        try:
            before = read(path)
        except Failure:  # a run replaces what is no result
            return
        then = before["environment"]
        same = all(then.get(n) == v for n, v in here.items() if n != "date")
        if same and before["options"] == options and not fresh:
            self.record |= {name: before[name] for name in ("skipped", "cases")}
        else:
            self.replaced = not fresh

    def find(self, key: Json) -> Json | None:
        """The case of this key, if it was measured."""
        return next((c for c in self.record["cases"] if all(c[n] == key[n] for n in KEY)), None)

    def add(self, case: Json) -> Json:
        """Add a case, and write the file; the case as it is in there."""
        case = _rounded(case)
        self.record["cases"].append(case)
        write(self.record, self.path)
        return case

    def skip(self, entry: Json) -> None:
        """Add what could not be measured, and why."""
        if entry not in self.record["skipped"]:
            self.record["skipped"].append(entry)
            write(self.record, self.path)


def read(path: Path) -> Json:
    """Read the results of a run.

    Raises:
        Failure: There are none.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        raise Failure(f"report: expected the JSON of a run, got {path}: {reason}") from error
    if not isinstance(record, dict) or not set(PARTS) <= set(record):
        raise Failure(f"report: expected the JSON of a run, got {path}: not one of this benchmark")
    return record


def write(record: Json, path: Path) -> None:
    """Write the file in one step: whoever reads it, or kills the run, finds it whole."""
    parts = {name: json.dumps(record[name], indent=1, allow_nan=False) for name in PARTS[:-1]}
    cases = ",\n".join(json.dumps(case, allow_nan=False) for case in record["cases"])
    body = "".join(f'"{name}": {text},\n' for name, text in parts.items())
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, delete=False) as file:
        file.write(f'{{{body}"cases": [\n{cases}\n]}}\n')
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def machine(device: torch.device) -> Json:
    """What the numbers depend on: machine, versions, commit, and the code if that says "dirty"."""
    here = environment()
    features = []
    if _ops.EXTENSION:
        from neuromod_ext import _C

        features = _C.cpu_features()
    return {
        **here,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cpu_features": features,
        "kernels": "compiled" if _ops.EXTENSION else "reference",
        "dirty": None if here["commit"] is None else here["commit"].endswith("-dirty"),
        "code": _digest(),
    }


def processor() -> str:
    """The processor, and the instruction set to which ``NEUROMOD_ISA`` keeps it."""
    cpu, kept = str(environment()["cpu"]), os.environ.get("NEUROMOD_ISA")
    return f"{cpu}, kept to {kept}" if kept else cpu


def _digest() -> str:
    """Of the library's and the benchmark's files, binaries included."""
    digest = hashlib.sha256()
    for folder in (Path(neuromod_ext.__file__).parent, Path(__file__).parent):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".so")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _rounded(value: Any) -> Any:
    """Six digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
