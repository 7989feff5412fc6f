"""Builds the extension `neuromod_ext._C`: finds the compilers, says what is missing, runs CMake.

Environment: NEUROMOD_CUDA=0|1 (default: wherever nvcc is found), NEUROMOD_CUDA_ARCHS (default
"80;90a;100"; "80-virtual" for PTX alone), NEUROMOD_EMULATOR=1 (also build the tests' emulator),
MAX_JOBS, CXX, and CUDACXX or CUDA_HOME (where nvcc is).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 11)


def fail(message: str) -> None:
    """Ends the build with one line."""
    raise SystemExit(f"neuromod_ext: {message}")


def check_torch() -> None:
    try:
        import torch
    except ImportError as error:
        fail(
            f"torch is not importable by {sys.executable} ({error}); install it first, "
            "and build with --no-build-isolation"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_MINIMUM:
        wanted = ".".join(map(str, TORCH_MINIMUM))
        fail(f"expected torch >= {wanted}, found {torch.__version__}; upgrade torch")


def find_tool(name: str) -> str:
    path = shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if path is None:
        fail(f"{name} was not found; pip install {name}")
    return str(path)


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        fail(
            f"no C++ compiler: {compiler!r} was not found; "
            "install g++ (>= 12) or clang (>= 15), or set CXX"
        )


def find_nvcc() -> str | None:
    """The CUDA compiler itself, not a wrapper of it: CMake looks for the toolkit beside it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [
        os.environ.get("CUDACXX"),
        *(f"{home}/bin/nvcc" for home in homes if home),
        shutil.which("nvcc"),
    ]
    for candidate in candidates:
        if candidate and os.path.isfile(candidate):
            dry_run = [candidate, "--dryrun", "x.cu"]
            listing = subprocess.run(dry_run, capture_output=True, text=True)
            for line in listing.stderr.splitlines():
                if line.startswith("#$ _HERE_="):
                    return os.path.join(line.removeprefix("#$ _HERE_="), "nvcc")
    return None


def cuda_choice() -> tuple[str | None, str]:
    """nvcc's path, or None to build without CUDA, and the reason for it."""
    wish = os.environ.get("NEUROMOD_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"expected NEUROMOD_CUDA to be 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "NEUROMOD_CUDA=0 when it was built"
    nvcc = find_nvcc()
    if nvcc is None and wish == "1":
        fail(
            "NEUROMOD_CUDA=1, but nvcc was not found; "
            "install the CUDA toolkit or set CUDACXX to nvcc's path"
        )
    return nvcc, "nvcc was found" if nvcc else "no nvcc was found when it was built"


class CMakeBuild(build_ext):
    """Runs CMake with ninja; its incremental build lives in build/."""

    def build_extension(self, ext: Extension) -> None:
        check_torch()
        check_compiler()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        nvcc, reason = cuda_choice()
        print(f"neuromod_ext: {'with' if nvcc else 'without'} CUDA kernels ({reason})", flush=True)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "NEUROMOD_CUDA": "ON" if nvcc else "OFF",
            "NEUROMOD_CUDA_REASON": reason,
            "NEUROMOD_CUDA_ARCHS": os.environ.get("NEUROMOD_CUDA_ARCHS", "80;90a;100"),
            "NEUROMOD_EMULATOR": "ON" if os.environ.get("NEUROMOD_EMULATOR") == "1" else "OFF",
        }
        if nvcc:
            definitions["CMAKE_CUDA_COMPILER"] = nvcc
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
            if subprocess.run(command).returncode != 0:
                fail("the build failed; the compiler's own words stand above")


if __name__ == "__main__":  # benchmarks/kernels.py asks where nvcc is
    setup(
        ext_modules=[Extension("neuromod_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
