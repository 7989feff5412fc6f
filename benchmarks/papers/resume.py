"""What a run has done so far, kept so that the same command goes on after an interruption."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.papers.report import Failure, plain


class Kept:
    """A folder with the state of each part of a run, and with the options of the run.

    A file is written beside its place and then moved there, so that it is always whole.

    Args:
        folder: Made if there is none.
        options: Whatever the results depend on.
        fresh: Forget what another run has left.

    Raises:
        Failure: The folder was left by a run with other options.
    """

    def __init__(self, folder: Path, options: dict[str, Any], *, fresh: bool = False) -> None:
        self.folder = folder
        if fresh:
            self.forget()
        folder.mkdir(exist_ok=True)
        mine = json.dumps(options, default=plain, sort_keys=True)
        file = folder / "options.json"
        if not file.exists():
            self._put(file, mine.encode())
        theirs = file.read_text()
        if theirs != mine:
            before, now = json.loads(theirs), json.loads(mine)
            name = next(n for n in {**before, **now} if before.get(n) != now.get(n))
            raise Failure(
                f"--{name.replace('_', '-')}: expected {before.get(name)}, with which an "
                f"unfinished run has begun in {folder}, got {now.get(name)}; finish that, "
                "or pass --fresh to forget it"
            )

    def load(self, part: str) -> dict[str, Any] | None:
        """The state of a part; None if there is none."""
        file = self.folder / f"{part}.pt"
        return torch.load(file, weights_only=True) if file.exists() else None

    def save(self, part: str, state: dict[str, Any]) -> None:
        """Keep the state of a part: tensors, numbers, strings, and lists and dicts of them."""
        file = self.folder / f"{part}.pt"
        with _Beside(file) as beside:
            torch.save(state, beside)

    def forget(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _put(self, file: Path, content: bytes) -> None:
        with _Beside(file) as beside:
            beside.write_bytes(content)


class _Beside:
    """A path beside a file, moved to it once it is written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.beside = file.with_name(f"{file.name}.new")

    def __enter__(self) -> Path:
        return self.beside

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            os.replace(self.beside, self.file)
