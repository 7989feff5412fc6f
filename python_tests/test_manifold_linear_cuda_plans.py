"""The plans of manifold_linear on CUDA, emulated: each is right by itself, and chosen by its cost.

A plan is forced by the environment variable NEUROMOD_CUDA_PLAN: ``simt`` are the plain kernels;
``small``, ``large`` and ``fold`` run on tensor cores, float32 only where torch allows it tf32;
``expand_gemm`` and ``fold_gemm`` are torch's matrix products between our kernels, here those for
the CPU.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bounds import check, exact
from conftest import EMULATED, Backend
from entry import Call
from linear_entries import LINEAR, linear_call
from op_entries import OPS
from sampling import DTYPES, LAYOUTS, Draw, name_of, placed

from neuromod_ext import _C

NAMES = [op.name for op in LINEAR]
HALF = (torch.bfloat16, torch.float16)
NARROW = (*HALF, torch.float32)
CUDA_PLANS = ("simt", "small", "large", "fold", "expand_gemm", "fold_gemm")
BACKWARD = ("manifold_linear_backward", "gxPcb")
BACKWARD_LOCAL = ("manifold_linear_local_backward", "gxPicb")
RAGGED = [  # B, tokens, K, O, I: beside the edges of slices (32) and tiles (64, 128, 256)
    (130, (), 2, 129, 40),
    (3, (66,), 3, 72, 136),
    (2, (260,), 2, 33, 65),
    (5, (), 6, 30, 450),
]
every_plan = pytest.mark.parametrize("plan", CUDA_PLANS)
own_plans = pytest.mark.parametrize("plan", [p for p in CUDA_PLANS if not p.endswith("_gemm")])
narrow = pytest.mark.parametrize("dtype", NARROW, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.fixture(scope="session")
def emulated() -> Backend:
    assert EMULATED.exists(), f"{EMULATED.name} is not built: run `make`"
    torch.ops.load_library(str(EMULATED))
    return Backend("emulated", torch.ops.neuromod_emulated, "cpu", 1.0)


@pytest.fixture
def forced(plan: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NEUROMOD_CUDA_PLAN", plan)
    return plan


def verify(name: str, emulated: Backend, call: Call, draw: Draw) -> None:
    op = OPS[name]
    want = op.expected(call)
    for got, expected in zip(op.run(emulated.op(name), call), want, strict=True):
        check(got, expected, draw)


def full_call(draw: Draw, roles: str, sizes: tuple[Any, ...]) -> Call:
    """All operands and all results, with an index half of the basis points."""
    B, middle, K, O, I = sizes
    local = (K + 1) // 2 if "i" in roles else None
    call = linear_call(draw, roles, B, middle, K, O, I, bias=True, L=local)
    if call.others:
        call.others["needed"] = [True] * 4
    return call


@pytest.mark.parametrize(
    "cases", [pytest.param(3, id="quick"), pytest.param(100, id="full", marks=pytest.mark.full)]
)
@every_dtype
@pytest.mark.parametrize("name", NAMES)
@every_plan
def test_fuzz(name: str, dtype: torch.dtype, forced: str, cases: int, emulated: Backend) -> None:
    """Any sizes, empty ones included, in any layout."""
    for i in range(cases):
        draw = Draw(f"{forced}/{name}/{name_of(dtype)}/{i}", dtype, layouts=LAYOUTS)
        verify(name, emulated, OPS[name].draw(draw, 20_000), draw)


@pytest.mark.parametrize("sizes", RAGGED, ids=str)
@every_plan
def test_ragged(sizes: tuple[Any, ...], forced: str, emulated: Backend) -> None:
    """Forward, all gradients at once and the update in place, dense or with an index."""
    for i, (name, roles) in enumerate(
        {
            "manifold_linear": "xPcb",
            "manifold_linear_local_backward": "gxPicb",
            "manifold_linear_update_": "Pgxc",
        }.items()
    ):
        draw = Draw(f"ragged/{sizes}/{name}", NARROW[i])
        verify(name, emulated, full_call(draw, roles, sizes), draw)


INDICES = {
    "scattered": lambda b: 7 * b * b % 23 - 11,
    "in order": lambda b: b * 11 // 150,
    "descending": lambda b: -b // 9,
    "one": lambda b: 10,
    "two": lambda b: 3 * (b % 2),
    "far": lambda b: (-(2**63), 2**63 - 1, 2**40 + 3)[b % 3],
}


SORTED = [("small", 2, name) for name in INDICES]
SORTED += [("small", 10, "scattered"), ("large", 4, "scattered"), ("large", 2, "two")]


@pytest.mark.parametrize(("plan", "L", "name"), SORTED)
def test_segments(name: str, forced: str, L: int, emulated: Backend) -> None:
    """Samples are sorted by index: any index, tiles of one segment and of all, tokens or not."""
    for tokens in ((), (3,)):
        draw = Draw(f"segments/{L}/{tokens}", torch.bfloat16)
        call = linear_call(draw, BACKWARD_LOCAL[1], 150, tokens, 11, 20, 70, bias=True, L=L)
        call.others["needed"] = [True] * 4
        call.tensors[3] = torch.tensor([INDICES[name](b) for b in range(150)])
        verify(BACKWARD_LOCAL[0], emulated, call, draw)
        verify("manifold_linear_local", emulated, Call(call.tensors[1:]), draw)


@narrow
@own_plans
def test_alignment_does_not_matter(dtype: torch.dtype, forced: str, emulated: Backend) -> None:
    """Rows that cp.async can copy give the same bits as rows it cannot.

    torch's product, of the other plans, may not: here MKL's, away from Intel's processors.
    """
    name, roles = BACKWARD
    draw = Draw(f"aligned/{name_of(dtype)}", dtype)
    call = full_call(draw, roles, (40, (3,), 3, 48, 64))
    moved = call.map(lambda t: placed(t, "offset"))
    first = [
        *OPS[name].run(emulated.op(name), call),
        emulated.op("manifold_linear")(*call.tensors[1:]),
    ]
    other = [
        *OPS[name].run(emulated.op(name), moved),
        emulated.op("manifold_linear")(*moved.tensors[1:]),
    ]
    assert moved.tensors[1].data_ptr() % 16 != 0
    for a, b in zip(first, other, strict=True):
        assert torch.equal(a, b)


@every_plan
def test_every_choice_of_gradients(forced: str, emulated: Backend) -> None:
    """A gradient is the same bits without the others."""
    name, roles = BACKWARD
    call = full_call(Draw("mask", torch.bfloat16), roles, (6, (3,), 2, 40, 150))
    everything = OPS[name].run(emulated.op(name), call)
    for mask in itertools.product((True, False), repeat=4):
        some = OPS[name].run(emulated.op(name), Call(call.tensors, {"needed": list(mask)}))
        for need, got, want in zip(mask, some, everything, strict=True):
            assert torch.equal(got, want) if need else got.shape == (0,), mask


@every_plan
def test_in_any_order_of_threads(forced: str, emulated: Backend) -> None:
    """The same bits with lanes, warps and blocks in reverse: no barrier is missing."""
    reverse: Callable[[bool], None] = ctypes.CDLL(str(EMULATED)).neuromod_emulator_reverse_lanes
    name, roles = BACKWARD
    call = full_call(Draw("reversed", torch.float16), roles, (4, (40,), 5, 70, 130))
    forward = emulated.op("manifold_linear")
    first = [*OPS[name].run(emulated.op(name), call), forward(*call.tensors[1:])]
    reverse(True)
    try:
        other = [*OPS[name].run(emulated.op(name), call), forward(*call.tensors[1:])]
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
@pytest.mark.parametrize("plan", ["small", "large"])
def test_tf32_where_torch_allows_it(forced: str, emulated: Backend) -> None:
    """Both operands of a product are rounded to 11 bits, by 2⁻¹¹ each; nothing else changes."""
    name, roles = BACKWARD
    call = full_call(Draw("tf32", torch.float32), roles, (37, (2,), 3, 67, 70))
    for op, arguments in ((name, call), ("manifold_linear", Call(call.tensors[1:]))):
        exactly = OPS[op].run(emulated.op(op), arguments)
        for got, want in zip(exactly, OPS[op].expected(arguments), strict=True):
            error = np.abs(exact(got) - want.value)
            assert (error <= 2 * 2.0**-11 * want.scale + want.bound()).all()
            if got.shape != arguments.tensors[-1].shape:  # no product behind the bias's gradient
                assert (error > want.bound()).any()


def test_tensor_cores_are_the_rule(emulated: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a forced plan: small tiles for a small batch, fold for samples of many tokens."""
    for sizes, plan in (((70, (), 3, 64, 300), "small"), ((2, (256,), 3, 64, 96), "fold")):
        call = full_call(Draw(plan, torch.bfloat16), "xPcb", sizes)
        by_plan = {}
        for name in (plan, "simt", ""):
            monkeypatch.setenv("NEUROMOD_CUDA_PLAN", name)
            by_plan[name] = emulated.op("manifold_linear")(*call.tensors)
        assert torch.equal(by_plan[""], by_plan[plan])
        assert not torch.equal(by_plan["simt"], by_plan[plan])


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_plan_is_refused(
    name: str, emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROMOD_CUDA_PLAN", "quickly")
    plans = "simt, small, large, fold, expand_gemm or fold_gemm"
    words = f"expected NEUROMOD_CUDA_PLAN to be {plans}, got quickly; unset it"
    call = OPS[name].large(Draw("unknown", torch.float32))
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        OPS[name].run(emulated.op(name), call)


# The choice


def explained(dtype: torch.dtype, sizes: tuple[int, ...]) -> dict[str, list[tuple[str, float]]]:
    names = ("batch", "tokens", "num_basis", "out_features", "in_features")
    problem = dict(zip(names, sizes, strict=True))
    return _C.explain(device="cuda", dtype=name_of(dtype), **problem)


CHOICES = [  # B, T, K, O, I, and what is taken for y
    (torch.float64, (2, 1, 2, 3, 4), "simt"),
    (torch.float64, (200, 1, 3, 40, 48), "expand_gemm"),
    (torch.bfloat16, (70, 1, 3, 64, 300), "small"),
    (torch.bfloat16, (2, 256, 3, 64, 96), "fold"),
    (torch.float32, (4, 300, 8, 32, 40), "fold_gemm"),
]


@pytest.mark.parametrize(("dtype", "sizes", "plan"), CHOICES, ids=lambda v: str(v))
def test_what_is_explained_is_what_is_done(
    dtype: torch.dtype, sizes: tuple[int, ...], plan: str, emulated: Backend, monkeypatch
) -> None:
    """Each pass takes the first of its plans: the same bits as if that is forced."""
    B, T, K, O, I = sizes
    plans = {name: [name for name, _ in found] for name, found in explained(dtype, sizes).items()}
    assert plans["forward"][0] == plan
    for pass_, name, roles in (
        ("forward", "manifold_linear", "xPcb"),
        ("grad_input", "manifold_linear_grad_input", "gPc"),
        ("grad_basis", "manifold_linear_grad_basis", "gxc"),
    ):
        draw = Draw(f"explained/{name}/{sizes}", dtype)
        call = linear_call(draw, roles, B, (T,), K, O, I, bias=True)
        by_plan = {}
        for forced in ("", *plans[pass_]):
            monkeypatch.setenv("NEUROMOD_CUDA_PLAN", forced)
            (by_plan[forced],) = OPS[name].run(emulated.op(name), call)
            check(by_plan[forced], OPS[name].expected(call)[0], draw)
        assert torch.equal(by_plan[""], by_plan[plans[pass_][0]])


def test_costs_are_in_order_and_a_forced_plan_is_first(monkeypatch) -> None:
    monkeypatch.delenv("NEUROMOD_CUDA_PLAN", raising=False)
    sizes = (4096, 1, 3, 4096, 4096)
    found = explained(torch.bfloat16, sizes)
    for plans in found.values():
        seconds = [cost for _, cost in plans]
        assert seconds == sorted(seconds)
        assert seconds[0] > 1e-4  # 412 Gflop, or 137 for what fold does
    assert found["forward"][0][0] == "expand_gemm"
    together = [name for name in found if "grad_coeff" in name]  # a sum of float32's precision
    assert not any("gemm" in plan for name in together for plan, _ in found[name])
    monkeypatch.setenv("NEUROMOD_CUDA_PLAN", "large")
    assert explained(torch.bfloat16, sizes)["forward"][0][0] == "large"
    without_tiles = explained(torch.float64, sizes)["forward"]
    assert without_tiles[0][0] == "simt"  # of our own kernels
    assert without_tiles[1][0] == "expand_gemm"


def test_products_that_float16_may_not_hold_are_not_stored() -> None:
    sizes = (4096, 1, 3, 4096, 4096)
    plans = {name: dict(found) for name, found in explained(torch.float16, sizes).items()}
    assert "expand_gemm" not in plans["forward"]
    assert "expand_gemm" in plans["grad_input"]


@pytest.mark.parametrize("plan", ["expand_gemm", "fold_gemm"])
def test_long_calls_go_in_chunks(plan: str, forced: str, emulated: Backend) -> None:
    """More rows, or samples, than are stored at a time."""
    sizes = (300, (), 17, 8000, 2) if plan == "expand_gemm" else (5, (2,), 2, 3000, 3000)
    draw = Draw(f"chunks/{plan}", torch.float64 if plan == "expand_gemm" else torch.float32)
    call = linear_call(draw, "xPcb", *sizes, bias=True)
    for name, given in (
        ("manifold_linear", call),
        ("manifold_linear_grad_input", linear_call(draw, "gPc", *sizes, bias=True)),
    ):
        (got,) = OPS[name].run(emulated.op(name), given)
        x, P, c = (t.double() for t in given.tensors[:3])
        rows = "b...i,koi,bk->b...o" if name == "manifold_linear" else "b...o,koi,bk->b...i"
        want = torch.einsum(rows, x, P, c)
        if name == "manifold_linear":
            shift = c @ given.tensors[3].double()
            want = want + shift.view(len(c), *(1,) * (x.dim() - 2), -1)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)
