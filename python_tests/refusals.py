"""Runs of the experiments that are refused."""

import pytest

from benchmarks.papers.__main__ import main


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run says which fails."""
    capsys.readouterr()
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown
