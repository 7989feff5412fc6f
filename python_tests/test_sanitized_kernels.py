"""manifold_linear's CUDA kernels on the emulator, built with AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = (
    "-std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all "
    "-DNEUROMOD_EMULATED -Wno-unknown-pragmas -I. -x c++"
)


@pytest.mark.full
def test_every_plan_within_its_memory_and_bound(tmp_path: Path) -> None:
    """150 problems, in all plans: what is read and written beyond an operand ends the program."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    sources = ["emulator/emulator.cpp", "emulator/fiber.cpp"]
    sources += ["manifold_linear/manifold_linear_cuda_plan.cpp"]
    sources += sorted(str(path.relative_to(CSRC)) for path in CSRC.glob("manifold_linear/*.cu"))
    program = tmp_path / "fuzz"
    command = [compiler, *FLAGS.split(), *sources, "manifold_linear/manifold_linear_fuzz.cpp"]
    built = subprocess.run([*command, "-o", str(program)], cwd=CSRC, capture_output=True, text=True)
    if "sanitize" in built.stderr and built.returncode != 0:
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([program, "150", "1"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "150 cases, 0 failed"
