"""Every op against its formula in wide arithmetic: random sizes, layouts and dtypes."""

import pytest
import torch
from bounds import check
from conftest import Backend
from op_entries import OPS
from sampling import LAYOUTS, Draw, name_of

TIERS = [pytest.param(250, id="quick"), pytest.param(10_000, id="full", marks=pytest.mark.full)]
CASES = [
    pytest.param(name, dtype, id=f"{name}-{name_of(dtype)}")
    for name, op in OPS.items()
    for dtype in op.dtypes
]


@pytest.mark.parametrize("total", TIERS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_fuzz(name: str, dtype: torch.dtype, total: int, backend: Backend) -> None:
    op, function = OPS[name], backend.op(name)
    most = 200_000 if backend.share == 1 else 20_000
    nonempty = 0
    cases = backend.cases(-(-total // len(op.dtypes)))
    for i in range(cases):
        draw = Draw(f"{name}/{name_of(dtype)}/{i}", dtype, backend.device, LAYOUTS)
        call = op.draw(draw, most)
        want = op.expected(call)
        for got, expected in zip(op.run(function, call), want, strict=True):
            check(got, expected, draw)
            nonempty += got.numel() > 0
            assert op.mutates or got.is_contiguous(), draw
    assert nonempty >= cases // 3
