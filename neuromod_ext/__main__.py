"""``python -m neuromod_ext info``: what is installed here, and what it can do."""

from __future__ import annotations

import platform
import sys

import torch

import neuromod_ext
from neuromod_ext import _ops

USAGE = "usage: python -m neuromod_ext info"


def _arch(name: str) -> str:
    return f"compute_{name[:-8]} (PTX)" if name.endswith("-virtual") else f"sm_{name}"


def info() -> str:
    """Versions, the build, CUDA or not and why, CPU features, and the kernels there are."""
    rows = [
        ("neuromod_ext", neuromod_ext.__version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
    ]
    if _ops.EXTENSION:
        from neuromod_ext import _C

        build = _C.build_info()
        cuda = (
            f"nvcc {build['cuda']}, for {', '.join(map(_arch, build['cuda_archs'].split()))}"
            if build["cuda"]
            else f"not built: {build['cuda_reason']}"
        )
        devices = "CPU, CUDA" if build["cuda"] else "CPU"
        rows += [
            ("built against", f"torch {build['torch']}, compiler {build['compiler']}"),
            ("CUDA kernels", cuda),
            ("CUDA device", _cuda_device()),
            ("CPU features", ", ".join(_C.cpu_features()) or "none that the kernels use"),
            ("threads", str(torch.get_num_threads())),
            ("ops", "\n".join(f"{name}  [{devices}]" for name in _ops.NAMES)),
        ]
    else:
        rows += [
            ("compiled kernels", f"none: {_ops.LOAD_ERROR}"),
            ("ops", "\n".join(f"{name}  [PyTorch reference]" for name in _ops.NAMES)),
        ]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(
        f"{label:{width}}" + text.replace("\n", "\n" + " " * width) for label, text in rows
    )


def _cuda_device() -> str:
    if torch.version.cuda is None:
        return "none: this torch has no CUDA"
    if not torch.cuda.is_available():
        return "none: torch finds no driver or no GPU"
    return torch.cuda.get_device_name()


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    if arguments == ["info"]:
        print(info())
        return 0
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    print(
        f"neuromod_ext: expected the command info, got {' '.join(arguments) or 'nothing'}; {USAGE}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
