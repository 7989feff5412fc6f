"""The CUDA kernels on the emulator, built with AddressSanitizer and UBSan, host functions included.

An access beyond a tensor or beyond shared memory, an overflow or a misaligned vector ends the
program.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from neuromod_ext import _ops

ROOT = Path(__file__).resolve().parents[1]
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "sanitized"
FLAGS = (
    "-std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all "
    "-DNEUROMOD_EMULATED -Wno-unknown-pragmas -I. -x c++"
)
CASES = 2000  # of each op
COMPILER = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
]


def run(command: Sequence[object], **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    settings = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **environment}
    return subprocess.run(words, cwd=CSRC, capture_output=True, text=True, env=settings)


def has_sanitizers(folder: Path) -> bool:
    program = folder / "empty.cpp"
    program.write_text("int main() {}\n")
    flags = [flag for flag in FLAGS.split() if flag.startswith("-fsanitize")]
    return run([COMPILER, *flags, program, "-o", folder / "empty"]).returncode == 0


def test_every_plan_within_its_memory_and_bound(tmp_path: Path) -> None:
    """150 problems of manifold_linear, in all plans of its kernels."""
    if not has_sanitizers(tmp_path):
        pytest.skip("this compiler has no sanitizers")
    sources = ["emulator/emulator.cpp", "emulator/fiber.cpp"]
    sources += ["manifold_linear/manifold_linear_cuda_plan.cpp"]
    sources += sorted(str(path.relative_to(CSRC)) for path in CSRC.glob("manifold_linear/*.cu"))
    program = tmp_path / "fuzz"
    command = [COMPILER, *FLAGS.split(), *sources, "manifold_linear/manifold_linear_fuzz.cpp"]
    built = run([*command, "-o", program])
    assert built.returncode == 0, built.stderr
    done = run([program, 150, 1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "150 cases, 0 failed"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the tests' emulated library is one with sanitizers."""
    if not has_sanitizers(tmp_path_factory.mktemp("sanitizers")):
        pytest.skip("this compiler has no sanitizers")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "NEUROMOD_EMULATOR": "ON",
        "NEUROMOD_SANITIZE": "ON",
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    cmake = shutil.which("cmake", path=os.pathsep.join(paths))
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # of several pytest processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", ROOT, "-B", BUILD, *definitions],
            [cmake, "--build", BUILD, "--target", "neuromod_emulated", "--parallel", 2],
        ):
            built = run(command)
            assert built.returncode == 0, built.stdout + built.stderr
    found = [run([COMPILER, f"-print-file-name={name}.so"]) for name in ("libasan", "libstdc++")]
    return {  # libstdc++ too, since ASan looks for its exceptions before Python has loaded it
        "LD_PRELOAD": " ".join(each.stdout.strip() for each in found),
        "NEUROMOD_EMULATED": str(BUILD / "libneuromod_emulated.so"),
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.parametrize("name", _ops.NAMES)
def test_every_op(name: str, library: dict[str, str]) -> None:
    script = ROOT / "python_tests" / "sanitizer_cases.py"
    done = run([sys.executable, script, "emulated", CASES, name], **library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{name}: {CASES} calls"


@pytest.mark.parametrize("plan", ["small", "large", "fold", "expand_gemm", "fold_gemm"])
def test_every_plan(plan: str, library: dict[str, str]) -> None:
    """Of the fused backward pass, whatever the cost model takes."""
    script = ROOT / "python_tests" / "sanitizer_cases.py"
    name = "manifold_linear_backward"
    command = [sys.executable, script, "emulated", 200, name]
    done = run(command, **library, NEUROMOD_CUDA_PLAN=plan)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_suite(library: dict[str, str]) -> None:
    """What the quick tier runs on the emulated kernels."""
    command = [sys.executable, "-m", "pytest", ROOT / "python_tests", "--backend", "emulated"]
    done = run([*command, "-m", "not full", "-p", "no:cacheprovider"], **library)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


LIE = """
import os
import numpy, torch
torch.ops.load_library(os.environ["NEUROMOD_EMULATED"])
beyond = numpy.lib.stride_tricks.as_strided(numpy.ones(4096, numpy.float32), (1, 8192))
torch.ops.neuromod_emulated.interpolate_weights(torch.from_numpy(beyond), torch.ones(1, 1))
"""


def test_a_read_beyond_a_tensor_is_seen(library: dict[str, str]) -> None:
    done = run([sys.executable, "-c", LIE], **library)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
