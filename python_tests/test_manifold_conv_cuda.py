"""manifold_conv's CUDA kernels, emulated: every tile, layout and choice of gradients."""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bounds import check, exact
from conftest import EMULATED, Backend
from conv_entries import conv_call
from entry import Call
from op_entries import OPS
from sampling import DTYPES, Draw, name_of
from torch import Tensor

FORWARD, BACKWARD = "manifold_conv", "manifold_conv_backward"
WALK = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
LINE = {"stride": [2], "padding": [2], "dilation": [1], "groups": 1}
BOX = {"stride": [1, 2, 1], "padding": [1, 1, 1], "dilation": [1, 1, 1], "groups": 1}
TILED = {  # B, K, C, O of a group, pixels, kernel, how it walks
    "few pixels": (3, 3, 9, 70, [7, 8], [3, 3], WALK),
    "a tile and more": (1, 2, 20, 67, [9, 11], [3, 1], WALK | {"padding": [1, 0]}),
    "few outputs": (2, 4, 5, 33, [13, 21], [3, 3], WALK),
    "many of both": (1, 2, 8, 65, [4, 67], [1, 3], WALK | {"dilation": [1, 2]}),
    "many inputs": (1, 2, 66, 5, [9, 10], [2, 2], WALK),
    "and pixels": (2, 2, 72, 8, [11, 13], [2, 1], WALK | {"padding": [1, 0]}),
    "strides": (2, 3, 12, 10, [14, 23], [4, 3], WALK | {"stride": [2, 3], "dilation": [3, 2]}),
    "groups": (2, 2, 3, 9, [9, 9], [2, 2], WALK | {"groups": 3, "stride": [2, 1]}),
    "patches": (2, 2, 3, 8, [16, 12], [4, 4], WALK | {"stride": [4, 4], "padding": [0, 0]}),
    "beyond": (1, 2, 2, 3, [3, 2], [3, 3], WALK | {"padding": [5, 4], "stride": [5, 1]}),
    "many points": (2, 71, 2, 3, [3, 4], [2, 2], WALK),
    "line": (2, 3, 7, 11, [150], [5], LINE),
    "box": (2, 2, 3, 4, [3, 4, 5], [2, 3, 2], BOX),
}


@pytest.fixture(scope="session")
def emulated() -> Backend:
    assert EMULATED.exists(), f"{EMULATED.name} is not built: run `make`"
    torch.ops.load_library(str(EMULATED))
    return Backend("emulated", torch.ops.neuromod_emulated, "cpu", 1.0)


def full_call(draw: Draw, sizes: tuple[Any, ...], bias: bool = True) -> Call:
    """All operands of the backward op, and all results."""
    B, K, C, O, space, kernel, walk = sizes
    call = conv_call(draw, "gxPcb", B, K, C, O, space, kernel, walk, bias)
    call.others["needed"] = [True] * 4
    return call


def results(emulated: Backend, call: Call) -> list[Tensor]:
    """All gradients and the output."""
    options = {k: v for k, v in call.others.items() if k != "needed"}
    forward = emulated.op(FORWARD)(*call.tensors[1:], **options)
    return [*OPS[BACKWARD].run(emulated.op(BACKWARD), call), forward]


def expected(call: Call) -> list[Any]:
    options = {k: v for k, v in call.others.items() if k != "needed"}
    return [*OPS[BACKWARD].expected(call), *OPS[FORWARD].expected(Call(call.tensors[1:], options))]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sizes", TILED.values(), ids=TILED)
def test_tiles(sizes: tuple[Any, ...], dtype: torch.dtype, emulated: Backend) -> None:
    draw = Draw(f"tiles/{sizes}", dtype)
    call = full_call(draw, sizes)
    for got, want in zip(results(emulated, call), expected(call), strict=True):
        check(got, want, draw)


@pytest.mark.parametrize("channels", [8, 5])
def test_channels_last_does_not_matter(channels: int, emulated: Backend) -> None:
    """Rows of channels are read where they lie, or copied: the same bits, in the same layout."""
    call = full_call(Draw("last", torch.bfloat16), (3, 2, channels, 16, [5, 6], [3, 3], WALK))
    last = call.map(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)
    assert last.tensors[1].stride() != call.tensors[1].stride()
    for a, b in zip(results(emulated, call), results(emulated, last), strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous() and b.is_contiguous()


def test_every_choice_of_gradients(emulated: Backend) -> None:
    """A gradient is the same bits without the others."""
    call = full_call(Draw("mask", torch.float16), (5, 4, 3, 70, [4, 7], [2, 2], WALK))
    everything = OPS[BACKWARD].run(emulated.op(BACKWARD), call)
    for mask in itertools.product((True, False), repeat=4):
        some = Call(call.tensors, call.others | {"needed": list(mask)})
        got = OPS[BACKWARD].run(emulated.op(BACKWARD), some)
        for need, have, want in zip(mask, got, everything, strict=True):
            assert torch.equal(have, want) if need else have.shape == (0,), mask


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_in_any_order_of_threads(dtype: torch.dtype, emulated: Backend) -> None:
    """The same bits with lanes, warps and blocks in reverse: no barrier is missing."""
    reverse: Callable[[bool], None] = ctypes.CDLL(str(EMULATED)).neuromod_emulator_reverse_lanes
    for sizes in (TILED["few outputs"], TILED["a tile and more"]):
        call = full_call(Draw("reversed", dtype), sizes)
        first = results(emulated, call)
        reverse(True)
        try:
            other = results(emulated, call)
        finally:
            reverse(False)
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@pytest.fixture
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_tf32")
def test_tf32_where_torch_allows_it(emulated: Backend) -> None:
    """Both operands of a product are rounded to 11 bits, by 2⁻¹¹ each; nothing else changes.

    It shows in dx, dP and y; in dc such errors cancel, and behind dbeta there is no product.
    """
    for sizes in (TILED["strides"], TILED["a tile and more"]):
        call = full_call(Draw("tf32", torch.float32), sizes)
        for i, (got, want) in enumerate(zip(results(emulated, call), expected(call), strict=True)):
            error = np.abs(exact(got) - want.value)
            assert (error <= 2 * 2.0**-11 * want.scale + want.bound()).all()
            assert (error > want.bound()).any() or i in (2, 3)


def test_no_more_than_the_pixels_of_a_result_are_written(emulated: Backend) -> None:
    """The kernel of one tap and stride 2 leaves three of four pixels of x without a gradient: 0."""
    walk = WALK | {"stride": [2, 2], "padding": [0, 0]}
    call = full_call(Draw("holes", torch.float32), (2, 3, 4, 5, [7, 8], [1, 1], walk))
    grad = OPS[BACKWARD].run(emulated.op(BACKWARD), call)[0]
    assert (grad[:, :, ::2, ::2] != 0).all()
    assert not grad[:, :, 1::2].any() and not grad[:, :, :, 1::2].any()


def test_more_pixels_than_an_int_counts_are_refused(emulated: Backend) -> None:
    x = torch.zeros(1).expand(1, 1, 2**15, 2**15 - 2)
    P, c, one, border = torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1), [1, 1], [0, 1]
    words = r"input of fewer than 2\^30 pixels with their padding on CUDA, got \[32768, 32768\]"
    with pytest.raises(ValueError, match=f"manifold_conv: expected {words}"):
        emulated.op(FORWARD)(x, P, c, None, one, border, one, 1)
