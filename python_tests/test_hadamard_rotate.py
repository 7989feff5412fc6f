"""hadamard_rotate: what the generic tests of all ops cannot know of it."""

import pytest
import torch
from bounds import check
from conftest import Backend
from hadamard_entries import blocks, call_in_place, rotation, signs
from sampling import Draw
from torch.func import vmap

import neuromod_ext.functional as MF
from neuromod_ext import _ops, reference

DTYPES = (torch.float64, torch.float32)
# Powers of two and beside them, in one pass, in two, and as CUDA goes about them in two
SIZES = (1, 2, 3, 7, 8, 9, 255, 4096, 5000, 2**13, 2**14 + 1, 2**15 - 1, 40_000, 2**17)


def operands(d: Draw, n: int, *rest: int) -> tuple[torch.Tensor, torch.Tensor]:
    return d.values(*rest, n), signs(d, n)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_sizes(n: int, dtype: torch.dtype, inverse: bool, backend: Backend) -> None:
    w, d = operands(Draw(f"hadamard/{n}", dtype, backend.device), n)
    rotate = backend.op("hadamard_rotate")
    y = rotate(w, d, inverse)
    check(y, rotation(w, d, inverse)[0], f"{n}")
    mine = w.clone()
    assert backend.op("hadamard_rotate_")([mine], d, inverse) is None
    assert torch.equal(mine, y)
    error = (rotate(y, d, not inverse) - w).norm() / w.norm()
    levels = sum(levels + 3 for _, levels in blocks(n))
    assert float(error) <= 2 * levels * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_are_one_vector(dtype: torch.dtype, backend: Backend) -> None:
    """Wherever they are cut, within a cache line or a tile: the same bits as of one vector."""
    for i in range(6):
        d = Draw(
            f"pieces/{i}", dtype, backend.device, layouts=("contiguous", "transposed", "offset")
        )
        sizes = [[d.pick(1, 7, 64, 1000)], [d.pick(0, 3, 70), 211], [d.pick(33, 20_000)]]
        *parts, pattern = call_in_place(d, sizes).tensors
        whole = torch.cat([part.flatten() for part in parts])
        backend.op("hadamard_rotate_")(parts, pattern, bool(i % 2))
        backend.op("hadamard_rotate_")([whole], pattern, bool(i % 2))
        assert torch.equal(torch.cat([part.flatten() for part in parts]), whole)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [100, 20_000])
def test_the_reference_agrees(n: int, inverse: bool) -> None:
    w, d = operands(Draw("reference"), n, 2)
    want = _ops.OPS["hadamard_rotate"](w, d, inverse)
    torch.testing.assert_close(reference.hadamard_rotate(w, d, inverse), want)
    parts = [w[0, :7].clone(), w[0, 7:].clone()]
    reference.hadamard_rotate_(parts, d, inverse)
    torch.testing.assert_close(torch.cat(parts), want[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads: int) -> None:
    w, d = operands(Draw("threads", torch.float32), 300_000)
    want, before = MF.hadamard_rotate(w, d), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(MF.hadamard_rotate(w, d), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    w, d = operands(Draw("halves", torch.float32), 300)
    w = w.to(dtype)
    assert torch.equal(MF.hadamard_rotate(w, d), MF.hadamard_rotate(w.float(), d).to(dtype))
    with torch.autocast("cpu", dtype):
        assert MF.hadamard_rotate(w.float(), d).dtype == torch.float32


def test_signs_of_a_batch() -> None:
    d = Draw("vmap")
    w, pattern = d.values(4, 3, 11), torch.stack([signs(d, 11) for _ in range(4)])
    want = torch.stack([MF.hadamard_rotate(w[i], pattern[i]) for i in range(4)])
    torch.testing.assert_close(vmap(MF.hadamard_rotate)(w, pattern), want)
    shared = torch.stack([MF.hadamard_rotate(w[0], pattern[i]) for i in range(4)])
    torch.testing.assert_close(vmap(MF.hadamard_rotate, (None, 0))(w[0], pattern), shared)


def test_in_place_refuses() -> None:
    pattern, w = torch.ones(6, dtype=torch.int8), torch.randn(6)
    before = w.clone()
    with pytest.raises(
        ValueError, match=r"weights\[1\] in memory of its own, got one that overlaps"
    ):
        MF.hadamard_rotate_([w[:3], w[2:4]], pattern)
    with pytest.raises(ValueError, match=r"weights\[0\] without overlapping elements"):
        MF.hadamard_rotate_([w[:1].expand(5)], pattern)
    with pytest.raises(TypeError, match=r"expected weights\[1\] to be a Tensor, got int"):
        MF.hadamard_rotate_([w[:4], 3], pattern)
    with pytest.raises(NotImplementedError, match=r"no torch\.func transform"):
        vmap(lambda x: MF.hadamard_rotate_([x], pattern))(torch.randn(2, 5))
    assert torch.equal(w, before)


def test_autograd_notices_a_change_in_place() -> None:
    w = torch.randn(5, requires_grad=True)
    y = w.square()
    MF.hadamard_rotate_([w.detach()], torch.ones(6, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
