"""NaN and infinities spread exactly as in the einsums that the ops stand for.

Where the plans of a CPU kernel sum in different orders, an infinity can come out as NaN in one and
stay infinite in another; each is compared with the einsums in its own order. In no order does an
operand that is not finite leave a result finite that it enters.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import EMULATED, Backend
from entry import Call
from linear_entries import PLANS
from op_entries import OPS
from sampling import Draw, name_of

from neuromod_ext import _ops, reference

CASES = [
    pytest.param(name, dtype, id=f"{name}-{name_of(dtype)}")
    for name, op in OPS.items()
    for dtype in op.dtypes
]
PLANNED = [name for name, op in OPS.items() if op.plan]
VALUES = (math.nan, math.inf, -math.inf)
KINDS = (np.isnan, np.isposinf, np.isneginf)


def planted(name: str, draw: Draw, position: int) -> Call | None:
    """A call with one entry of one operand that is not finite, if it has such an operand.

    None of its operands is empty: a sum of no terms may be 0 whatever it would be multiplied by.
    """
    call = OPS[name].draw(draw, 20_000)
    t = call.tensors[position] if position < len(call.tensors) else None
    empty = any(u is not None and u.numel() == 0 for u in call.tensors)
    if t is None or empty or not t.is_floating_point():
        return None
    t.view(-1)[draw.random.randrange(t.numel())] = draw.pick(*VALUES)
    return call


def calls(name: str, dtype: torch.dtype, cases: int, device: str = "cpu") -> Iterator[Call]:
    for i, position in itertools.product(range(cases), range(6)):
        call = planted(
            name, Draw(f"nonfinite/{name}/{name_of(dtype)}/{i}", dtype, device), position
        )
        if call is not None:
            yield call


def verify(
    name: str, dtype: torch.dtype, backend: Backend, cases: int, plan: str | None = None
) -> None:
    """``plan``: in what order kernels sum, where it is not what the CPU's cost model says."""
    op, function, tried = OPS[name], backend.op(name), 0
    for call in calls(name, dtype, cases, backend.device):
        if op.plan and backend.name == "cpu":
            plan = op.plan(call)
        want = [e.value for e in op.expected(call, plan)]
        # A half type's odd depth is padded, and infinity times the padding is NaN.
        pads = plan in ("fold", "fold_gemm") or op.pads
        padded = pads and dtype.itemsize == 2 and backend.name == "cpu"
        for got, expected in zip(op.run(function, call), want, strict=True):
            numbers = got.double().cpu().numpy()
            for of in (np.isfinite,) if padded else KINDS:
                assert (of(numbers) == of(expected)).all(), call
        tried += 1
    assert tried >= cases // 2


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_positions(
    name: str, dtype: torch.dtype, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROMOD_CUDA_PLAN", "small")  # or SIMT: in the order of expand
    few = backend.cases(24) if "conv" not in name else 24  # whose operands are often empty
    verify(name, dtype, backend, few)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("plan", ["simt", "large", "fold"])
@pytest.mark.parametrize("name", PLANNED)
def test_positions_in_every_cuda_plan(
    name: str, plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROMOD_CUDA_PLAN", plan)
    torch.ops.load_library(str(EMULATED))
    emulated = Backend("emulated", torch.ops.neuromod_emulated, "cpu", 1.0)
    verify(name, dtype, emulated, 2, "fold" if plan == "fold" else None)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", PLANNED)
def test_positions_in_every_plan(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMOD_PLAN", plan)
    for dtype in OPS[name].dtypes:
        verify(name, dtype, Backend("cpu", torch.ops.neuromod_ext, "cpu", 1.0), 12)


@pytest.mark.parametrize("name", PLANNED)
def test_no_plan_leaves_finite_what_another_does_not(name: str) -> None:
    for call in calls(name, torch.float64, 30):
        first, *others = [
            [np.isfinite(e.value) for e in OPS[name].expected(call, plan)] for plan in PLANS
        ]
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert (a == b).all(), call


@pytest.mark.parametrize("name", _ops.NAMES)
def test_as_in_the_reference(name: str) -> None:
    """What runs where no kernel is built spreads them alike: to the same results, or more.

    It fills up local coefficients with zeros, by which infinities of other basis points become NaN.
    The convolutions' kernel does so with zeros around g, where the reference's gradient has none.
    """
    op = OPS[name]
    for i, position in itertools.product(range(40), range(6)):
        draws = [Draw(f"nonfinite/{name}/{i}", op.dtypes[i % len(op.dtypes)]) for _ in range(2)]
        calls = [planted(name, draw, position) for draw in draws]
        if calls[0] is None:
            continue
        by_kernel = op.run(_ops.OPS[name], calls[0])
        by_reference = op.run(getattr(reference, name), calls[1])
        for got, expected in zip(by_kernel, by_reference, strict=True):
            same = torch.equal(got.isfinite(), expected.isfinite())
            if not same and name.startswith("manifold_linear_local"):
                same = not (expected.isfinite() & ~got.isfinite()).any()
            if not same and name == "manifold_conv_backward":
                same = not (got.isfinite() & ~expected.isfinite()).any()
            assert same, f"{draws[0]}, operand {position}"


def test_the_oracle_tells_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One infinity gives infinities of both signs and, where they meet, NaN."""
    monkeypatch.setenv("NEUROMOD_PLAN", "expand")
    P, x, c = torch.ones(2, 1, 2), torch.tensor([[math.inf, 1.0]]), torch.tensor([[1.0, -1.0]])
    P[1, 0, 0] = 2
    (mixed,) = OPS["manifold_linear"].oracle(x, P, c)
    (plain,) = OPS["manifold_linear"].oracle(x, -P, c.abs())
    assert np.isnan(mixed.value).all()
    assert np.isneginf(plain.value).all()
    assert _ops.OPS["manifold_linear"](x, P, c).isnan().all()
