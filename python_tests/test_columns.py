"""The ops that are bound by memory, where the CUDA kernels' tiles, packs and parts begin and end.

A tile is 128 packs of 16 bytes; whole tiles of rows that begin on 16 bytes take another path.
"""

import pytest
import torch
from bounds import check
from conftest import Backend
from entry import Call
from op_entries import OPS, interpolate_call, step_call
from sampling import DTYPES, Draw, placed

ROLES = {
    "interpolate_weights": "Pc",
    "interpolate_weights_backward": "gPc",
    "interpolate_weights_grad_basis": "gc",
    "interpolate_weights_grad_coeff": "gP",
}
SIZES = ((1, 3), (3, 1), (8, 4), (9, 5), (17, 9))  # samples and basis points


def call_of(name: str, draw: Draw, length: int, i: int) -> Call:
    B, K = SIZES[i % len(SIZES)]
    if name == "manifold_step_":
        return step_call(draw, K, (length,), i % 3 > 0, i % 4 > 0)
    return interpolate_call(draw, ROLES[name], B, K, (length,))


def run(name: str, call: Call, backend: Backend, layout: str) -> list[torch.Tensor]:
    return OPS[name].run(backend.op(name), call.map(lambda t: placed(t.clone(), layout)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ROLES, "manifold_step_"])
def test_tiles(name: str, dtype: torch.dtype, backend: Backend) -> None:
    """Around the end of a tile, whole and in packs: in bounds, and the same bits off 16 bytes."""
    tile = 2048 // dtype.itemsize
    for i, length in enumerate((tile, tile - 1, tile + 1, 2 * tile, 2 * tile + tile // 2, 3)):
        draw = Draw(f"tiles/{name}/{length}", dtype, backend.device)
        call = call_of(name, draw, length, i)
        want = OPS[name].expected(call)
        whole, shifted = (run(name, call, backend, layout) for layout in ("plain", "offset"))
        for got, other, expected in zip(whole, shifted, want, strict=True):
            check(got, expected, draw)
            assert torch.equal(got, other) or backend.name == "cpu", draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_more_tiles_than_blocks(dtype: torch.dtype, backend: Backend) -> None:
    """Partial sums of a block's second tile are added to those of its first."""
    draw = Draw(f"parts/{dtype}", dtype, backend.device)
    call = interpolate_call(draw, "gPc", 2, 3, (266 * 2048 // dtype.itemsize + 5,))
    name = "interpolate_weights_backward"
    results = OPS[name].run(backend.op(name), call)
    for got, expected in zip(results, OPS[name].expected(call), strict=True):
        check(got, expected, draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("N", "K"), [(4095, 4), (4096, 5), (7000, 1), (9000, 9)])
def test_parts_of_a_metric(N: int, K: int, dtype: torch.dtype, backend: Backend) -> None:
    draw = Draw(f"metric/{N}", dtype, backend.device)
    for weight in (None, draw.coeff(N)):
        call = Call([draw.coeff(N, K), weight])
        (got,) = OPS["manifold_metric"].run(backend.op("manifold_metric"), call)
        check(got, OPS["manifold_metric"].expected(call)[0], draw)
        assert torch.equal(got, got.T)


@pytest.mark.full
@pytest.mark.parametrize("name", ["interpolate_weights", "manifold_metric"])
def test_more_work_than_a_grid_has_blocks(name: str, backend: Backend) -> None:
    """65535 groups of rows, or squares of the metric, and some more."""
    draw = Draw("grid", torch.float32, backend.device)
    if name == "manifold_metric":
        call = Call([draw.coeff(2, 1028), None])
    else:
        call = Call([draw.tensor(2, 3), draw.coeff(530_000, 2)])
    (got,) = OPS[name].run(backend.op(name), call)
    check(got, OPS[name].expected(call)[0], draw)
