"""``python -m neuromod_ext info``."""

import os
import subprocess
import sys

import torch

import neuromod_ext as nm
from neuromod_ext import __main__ as command
from neuromod_ext import _ops


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "neuromod_ext", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_info_names_versions_kernels_and_cuda(capsys):
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    assert nm.__version__ in text
    assert torch.__version__ in text
    for name in _ops.NAMES:
        assert name in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "nvcc" in lines["CUDA kernels"] or "not built: " in lines["CUDA kernels"]


def test_info_of_the_reference_says_why():
    result = run("info", NEUROMOD_REFERENCE="1")
    assert result.returncode == 0
    assert "none: NEUROMOD_REFERENCE=1 asks for the reference" in result.stdout
    assert "[PyTorch reference]" in result.stdout
    assert result.stderr == ""


def test_another_command_is_refused_in_one_line():
    result = run("inof")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "neuromod_ext: expected the command info, got inof; usage: python -m neuromod_ext info\n"
    )
