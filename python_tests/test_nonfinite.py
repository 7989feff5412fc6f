"""NaN and infinities spread exactly as in the einsums that the ops stand for."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import Backend
from op_entries import OPS, Call
from sampling import Draw, name_of

from neuromod_ext import _ops, reference

CASES = [
    pytest.param(name, dtype, id=f"{name}-{name_of(dtype)}")
    for name, op in OPS.items()
    for dtype in op.dtypes
]
VALUES = (math.nan, math.inf, -math.inf)


KINDS = (np.isnan, np.isposinf, np.isneginf)


def planted(name: str, draw: Draw, position: int) -> Call | None:
    """A call with one entry of one operand that is not finite, if it has such an operand."""
    call = OPS[name].draw(draw, 20_000)
    t = call.tensors[position] if position < len(call.tensors) else None
    if t is None or t.numel() == 0:
        return None
    t.view(-1)[draw.random.randrange(t.numel())] = draw.pick(*VALUES)
    return call


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_positions(name: str, dtype: torch.dtype, backend: Backend) -> None:
    op = OPS[name]
    cases, tried = backend.cases(40), 0
    for i, position in itertools.product(range(cases), range(4)):
        draw = Draw(f"nonfinite/{name}/{name_of(dtype)}/{i}", dtype, backend.device)
        call = planted(name, draw, position)
        if call is None:
            continue
        want = [e.value for e in op.oracle(*call.tensors, **call.numbers)]
        for got, expected in zip(op.run(backend.op(name), call), want, strict=True):
            numbers = got.double().cpu().numpy()
            for of in KINDS:
                assert (of(numbers) == of(expected)).all(), f"{draw}, operand {position}"
        tried += 1
    assert tried >= cases // 2


@pytest.mark.parametrize("name", _ops.NAMES)
def test_as_in_the_reference(name: str) -> None:
    """What runs where no kernel is built spreads them alike."""
    op = OPS[name]
    for i, position in itertools.product(range(40), range(4)):
        draws = [Draw(f"nonfinite/{name}/{i}", op.dtypes[i % len(op.dtypes)]) for _ in range(2)]
        calls = [planted(name, draw, position) for draw in draws]
        if calls[0] is None:
            continue
        by_kernel = op.run(_ops.OPS[name], calls[0])
        by_reference = op.run(getattr(reference, name), calls[1])
        for got, expected in zip(by_kernel, by_reference, strict=True):
            for of in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(of(got), of(expected)), f"{draws[0]}, operand {position}"


def test_the_oracle_tells_them_apart() -> None:
    """One infinity gives infinities of both signs and, where they meet, NaN."""
    P, x, c = torch.ones(2, 1, 2), torch.tensor([[math.inf, 1.0]]), torch.tensor([[1.0, -1.0]])
    P[1, 0, 0] = 2
    (mixed,) = OPS["manifold_linear"].oracle(x, P, c)
    (plain,) = OPS["manifold_linear"].oracle(x, -P, c.abs())
    assert np.isnan(mixed.value).all()
    assert np.isneginf(plain.value).all()
    assert _ops.OPS["manifold_linear"](x, P, c).isnan().all()
