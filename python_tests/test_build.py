"""setup.py: each thing that can be missing ends the build with one line that says what to do."""

import runpy
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def build(monkeypatch):
    """The functions of setup.py, without running a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("NEUROMOD_CUDA", "CUDACXX", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_a_torch_too_old_is_named(build, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        SystemExit, match=r"^neuromod_ext: expected torch >= 2.11, found 2.9.1\+cpu"
    ):
        build["check_torch"]()


def test_a_recent_torch_passes(build, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    build["check_torch"]()


def test_a_missing_compiler_is_named(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler: 'no-such-compiler' was not found"):
        build["check_compiler"]()


def test_a_missing_tool_is_named(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no-such-tool was not found; pip install no-such-tool"):
        build["find_tool"]("no-such-tool")


def test_no_nvcc(build, monkeypatch):
    monkeypatch.setitem(build["cuda_choice"].__globals__, "find_nvcc", lambda: None)
    assert build["cuda_choice"]() == (None, "no nvcc was found when it was built")
    monkeypatch.setenv("NEUROMOD_CUDA", "1")
    with pytest.raises(SystemExit, match="NEUROMOD_CUDA=1, but nvcc was not found; install"):
        build["cuda_choice"]()


def test_cuda_can_be_declined(build, monkeypatch):
    monkeypatch.setitem(build["cuda_choice"].__globals__, "find_nvcc", lambda: "/cuda/bin/nvcc")
    assert build["cuda_choice"]() == ("/cuda/bin/nvcc", "nvcc was found")
    monkeypatch.setenv("NEUROMOD_CUDA", "0")
    assert build["cuda_choice"]() == (None, "NEUROMOD_CUDA=0 when it was built")


def test_a_misspelt_choice_is_refused(build, monkeypatch):
    monkeypatch.setenv("NEUROMOD_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected NEUROMOD_CUDA to be 0 or 1, got 'yes'"):
        build["cuda_choice"]()


def test_nvcc_behind_a_wrapper_is_found(build, monkeypatch, tmp_path):
    wrapper = tmp_path / "nvcc"
    wrapper.write_text("#!/bin/sh\necho '#$ _HERE_=/real/cuda/bin' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(wrapper))
    assert build["find_nvcc"]() == "/real/cuda/bin/nvcc"
