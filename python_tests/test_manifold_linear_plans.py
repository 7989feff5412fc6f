"""The plans of manifold_linear on the CPU: each is right by itself, and chosen as `explain` says.

A plan is forced by the environment variable NEUROMOD_PLAN.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bounds import check
from entry import Call
from linear_entries import LINEAR, PLANS, linear_call
from op_entries import OPS
from sampling import DTYPES, LAYOUTS, Draw, name_of

from neuromod_ext import _C, _ops

NAMES = [op.name for op in LINEAR]
ROLES = {
    "manifold_linear": "xPcb",
    "manifold_linear_backward": "gxPcb",
    "manifold_linear_update_": "Pgxc",
    "manifold_linear_local": "xPicb",
    "manifold_linear_local_backward": "gxPicb",
}
RAGGED = [  # B, tokens, K, O, I: beside the edges of tiles (32, 64) and blocks (8, 16, 256, 1024)
    (1, (), 3, 65, 129),
    (2, (33,), 1, 64, 1),
    (3, (5, 7), 5, 1, 66),
    (17, (), 9, 67, 33),
    (70, (3,), 2, 130, 31),
    (5, (270,), 3, 7, 65),
    (300, (), 4, 3, 5),
    (1, (70,), 3, 260, 70),
    (1, (1030,), 1, 5, 300),
    (40, (), 2, 9, 1050),
    (30, (), 2, 33, 1050),
]
OWN = ("expand", "fold", "stream")  # torch's product, of the others, may sum anew with more threads
every_plan = pytest.mark.parametrize("plan", PLANS)
RARE = (torch.float16, torch.float64)  # go the ways of bfloat16 and float32; test_fuzz has them
every_way = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=pytest.mark.full) if d in RARE else d for d in DTYPES],
    ids=name_of,
)


@pytest.fixture
def forced(plan: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NEUROMOD_PLAN", plan)
    return plan


def copied(call: Call) -> Call:
    return Call([None if t is None else t.clone() for t in call.tensors], call.others)


def verify(name: str, call: Call, draw: Draw) -> None:
    op = OPS[name]
    want = op.expected(call)
    for got, expected in zip(op.run(_ops.OPS[name], call), want, strict=True):
        check(got, expected, draw)


@pytest.mark.parametrize(
    "cases", [pytest.param(25, id="quick"), pytest.param(500, id="full", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@every_plan
def test_fuzz(name: str, dtype: torch.dtype, forced: str, cases: int) -> None:
    """Any sizes, empty ones included, in any layout."""
    for i in range(cases):
        draw = Draw(f"{forced}/{name}/{name_of(dtype)}/{i}", dtype, layouts=LAYOUTS)
        verify(name, OPS[name].draw(draw, 50_000), draw)


def verify_ragged(sizes, dtype: torch.dtype) -> None:
    B, middle, K, O, I = sizes
    for name, roles in ROLES.items():
        draw = Draw(f"ragged/{sizes}/{name}/{name_of(dtype)}", dtype)
        call = linear_call(draw, roles, B, middle, K, O, I, bias=True, L=(K + 1) // 2)
        if call.others:
            call.others["needed"] = [True] * 4
        if "i" not in roles:
            call.tensors[roles.index("c")] = draw.coeff(B, K)
        verify(name, call, draw)


@every_way
@pytest.mark.parametrize("sizes", RAGGED, ids=lambda s: f"{s[0]}-{s[1]}-{s[2:]}")
@every_plan
def test_ragged(sizes, dtype: torch.dtype, forced: str) -> None:
    verify_ragged(sizes, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@every_plan
def test_without_onednn(dtype: torch.dtype, forced: str) -> None:
    """Its products are used where they may be; while it is switched off, others serve."""
    for enabled in (True, False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            verify_ragged((70, (3,), 2, 130, 31), dtype)


@every_way
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", OWN)
def test_same_bits_on_any_number_of_threads(name: str, dtype: torch.dtype, forced: str) -> None:
    op, call = OPS[name], OPS[name].large(Draw(f"threads/{name}", dtype))
    first = op.run(_ops.OPS[name], copied(call))
    assert all(t.isfinite().all() and t.any() for t in first)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(first, op.run(_ops.OPS[name], copied(call)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.full)], ids=name_of
)
@pytest.mark.parametrize("plan", ["expand", "expand_gemm"])
def test_many_rows(dtype: torch.dtype, forced: str) -> None:
    """More than are taken at a time, of basis points that lie apart."""
    draw = Draw(f"many rows/{name_of(dtype)}", dtype)
    for name, roles in ROLES.items():
        if "i" in roles:
            continue
        call = linear_call(draw, roles, 6000, (), 5, 70, 9, bias=True)
        at = roles.index("P")
        if name != "manifold_linear_update_":
            apart = call.tensors[at].new_empty(5, 71, 9)[:, 1:]
            call.tensors[at] = apart.copy_(call.tensors[at])
        verify(name, call, draw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("plan", ["expand", "stream"])
@pytest.mark.parametrize("K, I", [(9, 1024), (8, 1057)])
def test_few_rows_of_many_weights(K: int, I: int, dtype: torch.dtype, forced: str) -> None:
    """More than the caches keep."""
    draw = Draw(f"few rows/{K}/{name_of(dtype)}", dtype)
    verify("manifold_linear", linear_call(draw, "xPcb", 3, (), K, 1027, I, bias=True), draw)


@every_plan
@pytest.mark.parametrize("strides", [(1, 1, 1), (5, 1, 1), (1, 5, 1)])
def test_single_rows_of_any_stride(strides: tuple[int, int, int], forced: str) -> None:
    """The stride of a dimension of size 1 says nothing; it may be less than a row is long."""
    single = [torch.randn(5).as_strided((1, 5), strides[1:]) for _ in range(2)]
    basis = torch.randn(5).as_strided((1, 1, 5), strides)
    coeff, grad = torch.randn(1, 1), torch.randn(1, 1)
    want = basis[0] + coeff * grad * single[0]
    _ops.OPS["manifold_linear_update_"](basis, grad, single[0], coeff)
    torch.testing.assert_close(basis[0], want)
    got = _ops.OPS["manifold_linear"](single[1], basis, coeff, None)
    torch.testing.assert_close(got, coeff * single[1] @ want.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["fold", "fold_gemm"])
def test_same_bits_of_many_tokens(dtype: torch.dtype, forced: str) -> None:
    """Long sums of few samples; torch's matrix product takes another order with more threads."""
    draw = Draw(f"many tokens/{name_of(dtype)}", dtype)
    call = linear_call(draw, ROLES["manifold_linear_backward"], 2, (512,), 2, 64, 2048, bias=True)
    x = Call([call.tensors[i] for i in (1, 2, 3)] + [None], {})
    first: list[torch.Tensor] = []
    for threads in (1, 2, 4) if forced == "fold" else (2, 2, 2):
        torch.set_num_threads(threads)
        results = OPS["manifold_linear"].run(_ops.OPS["manifold_linear"], x)
        results += OPS["manifold_linear_backward"].run(_ops.OPS["manifold_linear_backward"], call)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True)), threads


@every_way
@pytest.mark.parametrize("sizes", [(1, 70_000, 64, 64), (5, 14_000, 64, 64), (9, 200, 300, 150)])
def test_packed_tokens(sizes, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan fold takes tokens, or samples, in groups, and blocks by the number of threads."""
    monkeypatch.setenv("NEUROMOD_PLAN", "fold")
    B, T, O, I = sizes
    random = torch.Generator().manual_seed(T)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g, x, P = (
        torch.randn(shape, generator=random).to(dtype)
        for shape in ((B, T, O), (B, T, I), (2, O, I))
    )
    c = torch.randn(B, 2, generator=random).to(wide)
    needed = [False, True, True, True]

    def gradients() -> list[torch.Tensor]:
        return _ops.OPS["manifold_linear_backward"](
            g, x, P, c, torch.zeros(2, O, dtype=dtype), needed
        )[1:]

    outer = torch.einsum("bto,bti->boi", g.double(), x.double())
    want = (
        torch.einsum("bk,boi->koi", c.double(), outer),
        torch.einsum("koi,boi->bk", P.double(), outer),
        torch.einsum("bk,bto->ko", c.double(), g.double()),
    )
    first = gradients()
    for got, expected in zip(first, want, strict=True):
        unit = torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got.double(),
            expected,
            rtol=unit,
            atol=float(16 * torch.finfo(wide).eps * T**0.5 * expected.abs().max()),
        )
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True)), threads


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "fp32_precision"])
def test_products_stay_full(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch's own products may round their operands to."""
    monkeypatch.delenv("NEUROMOD_PLAN", raising=False)
    sizes = {"batch": 4, "num_basis": 2, "out_features": 64, "in_features": 256, "tokens": 600}
    x, P, c = torch.randn(4, 600, 256), torch.randn(2, 64, 256), torch.rand(4, 2)
    want = torch.einsum("bti,koi,bk->bto", x.double(), P.double(), c.double())
    code = torch.backends.mkldnn.matmul if way == "fp32_precision" else None
    before = code.fp32_precision if code else torch.get_float32_matmul_precision()
    try:
        if code:
            code.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision("medium")
        y = _ops.OPS["manifold_linear"](x, P, c, None)
        assert _C.explain(**sizes, dtype="float32")["forward"][0][0] != "fold_gemm"
    finally:
        if code:
            code.fp32_precision = before
        else:
            torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)


def test_torch_s_new_way_to_allow_tf32_is_no_error() -> None:
    x, P, c = torch.randn(2, 3), torch.randn(2, 4, 3), torch.randn(2, 2)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert _ops.OPS["manifold_linear"](x, P, c, None).shape == (2, 4)
    finally:
        matmul.fp32_precision = before


@every_plan
def test_called_from_many_threads_at_once(forced: str) -> None:
    """Scratch memory belongs to a thread, and calls of other sizes follow each other on it."""
    calls = []
    for i, name in enumerate(NAMES * 2):
        draw = Draw(f"reentrant/{i}", DTYPES[i % 4])
        call = OPS[name].large(draw) if i % 3 == 0 else OPS[name].draw(draw, 50_000)
        calls.append((name, call, OPS[name].run(_ops.OPS[name], copied(call))))

    def work(turn: int) -> bool:
        order = calls[turn % len(calls) :] + calls[: turn % len(calls)]
        runs = ((OPS[name].run(_ops.OPS[name], copied(call)), want) for name, call, want in order)
        return all(torch.equal(a, b) for got, want in runs for a, b in zip(got, want, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))


# Which plan is taken


SHAPE = {"batch": 2, "tokens": 1, "num_basis": 4, "out_features": 5, "in_features": 6}


@pytest.mark.parametrize("local", [0, 2])
@every_plan
def test_a_forced_plan_comes_first(forced: str, local: int) -> None:
    plans = _C.explain(**SHAPE, dtype="float32", num_local=local)
    assert [plans[p][0][0] for p in ("forward", "backward")] == [forced, forced]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cheapest_plan_comes_first(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.delenv("NEUROMOD_PLAN", raising=False)
    pairs = f"{name_of(dtype)} pairs" in _C.cpu_features()
    for kind, plans in _C.explain(**SHAPE, dtype=name_of(dtype)).items():
        scales = dtype.itemsize > 2 or (pairs and kind == "update")  # and rounds what it scales
        possible = {name for name in PLANS if scales or name != "expand_gemm"}
        assert {name for name, _ in plans} == possible
        seconds = [cost for _, cost in plans]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0
    many = _C.explain(**SHAPE | {"batch": 1000}, dtype=name_of(dtype))
    assert {kind for kind, plans in many.items() if "stream" in dict(plans)} == {"forward"}


def test_what_plans_are_for(monkeypatch) -> None:
    """Many samples, many tokens of few samples, few rows: each has its plan."""
    monkeypatch.delenv("NEUROMOD_PLAN", raising=False)
    outrun = _C.torch_product_outruns_tiles()
    layer = {"dtype": "float32", "num_basis": 3, "out_features": 1024, "in_features": 1024}
    for sizes, plan in (
        ({"batch": 64}, "expand"),
        ({"batch": 1024}, "expand_gemm" if outrun else "expand"),
        ({"batch": 16, "tokens": 48}, "fold"),
        ({"batch": 4, "tokens": 1024}, "fold"),
        ({"batch": 1}, "stream"),
    ):
        assert _C.explain(**layer, **sizes)["forward"][0][0] == plan
    half = _C.explain(**layer | {"dtype": "bfloat16"}, batch=1)
    assert half["forward"][0][0] == half["backward"][0][0] == "stream"


def test_an_unknown_plan_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("NEUROMOD_PLAN", "quickly")
    words = (
        "manifold_linear: expected NEUROMOD_PLAN to be expand, fold, stream, fold_gemm or "
        "expand_gemm, got quickly; unset it"
    )
    for name in NAMES:
        call = OPS[name].large(Draw("unknown", torch.float32))
        with pytest.raises(ValueError, match="NEUROMOD_PLAN") as caught:
            OPS[name].run(_ops.OPS[name], call)
        assert str(caught.value) == words
    with pytest.raises(ValueError, match="NEUROMOD_PLAN") as caught:
        _C.explain(**SHAPE, dtype="float32")
    assert str(caught.value) == words


@pytest.mark.parametrize("function", ["explain", "tile_seconds"])
def test_an_unknown_dtype_is_refused(function: str) -> None:
    words = f"{function}: expected dtype float64, float32, bfloat16 or float16, got int8"
    sizes = SHAPE if function == "explain" else {"rows": 8, "cols": 8, "depth": 8, "repeats": 1}
    with pytest.raises(ValueError, match="dtype") as caught:
        getattr(_C, function)(**sizes, dtype="int8")
    assert str(caught.value) == words


@pytest.mark.parametrize("dtype", DTYPES)
def test_tile_seconds(dtype: torch.dtype) -> None:
    sizes = {"rows": 64, "cols": 32, "depth": 63, "repeats": 3}
    assert 0 < _C.tile_seconds(dtype=name_of(dtype), **sizes) < 1
