"""Random calls of every op, each result checked: what a sanitizer watches.

``compute-sanitizer --tool racecheck python python_tests/sanitizer_cases.py cuda 200``; without a
GPU, ``emulated`` in place of ``cuda``; further words name some ops. Shapes are small, since tools
are slow, but for a few calls that are large enough for several tiles and parts. Plans of our own
kernels take turns, since torch's are not what is watched.
"""

import os
import sys
from collections.abc import Sequence

import torch
from bounds import check
from conftest import EMULATED
from op_entries import OPS
from sampling import LAYOUTS, Draw

from neuromod_ext import _ops

FORCED = "NEUROMOD_CUDA_PLAN"


def main(backend: str, cases: int, names: Sequence[str] = _ops.NAMES) -> int:
    """The number of calls made."""
    torch.set_num_threads(1)
    namespace, device, made = torch.ops.neuromod_ext, backend, 0
    if backend == "emulated":
        torch.ops.load_library(str(EMULATED))
        namespace, device = torch.ops.neuromod_emulated, "cpu"
    given = os.environ.get(FORCED)
    plans = [given] if given else ["simt", "small", "large", "fold"]
    for name in names:
        op, function = OPS[name], getattr(namespace, name).default
        for i in range(cases):
            dtype = op.dtypes[i % len(op.dtypes)]
            os.environ[FORCED] = plans[i // len(op.dtypes) % len(plans)]
            draw = Draw(f"sanitizer/{name}/{i}", dtype, device, LAYOUTS)
            call = op.large(draw) if i in (0, 2) and cases > 2 else op.draw(draw, 2_000)
            want = op.expected(call)
            for got, expected in zip(op.run(function, call), want, strict=True):
                check(got, expected, draw)
            made += 1
        print(f"{name}: {cases} calls", flush=True)
    os.environ[FORCED] = given or ""
    return made


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] or _ops.NAMES)
