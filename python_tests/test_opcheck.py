"""torch.library.opcheck: schema, fake, autograd registration, AOT dispatch of every op."""

import itertools

import pytest
import torch
from entry import Call
from op_entries import OPS
from sampling import LAYOUTS, Draw
from torch import Tensor

from neuromod_ext import _ops

ALL_FOUR = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    "test_aot_dispatch_dynamic",
)
QUICK = 1  # float32 in most cases, of any layout
SAMPLES = [pytest.param(i, marks=[] if i == QUICK else pytest.mark.full) for i in range(20)]


@pytest.mark.parametrize("i", SAMPLES)
@pytest.mark.parametrize("name", _ops.NAMES)
def test_opcheck(name: str, i: int) -> None:
    op = OPS[name]
    dtype = op.dtypes[i % len(op.dtypes)]
    layouts = ("plain",) if i % 2 == 0 else tuple(n for n in LAYOUTS if n != "expanded")
    draws = (Draw(f"opcheck/{name}/{i}/{n}", dtype, layouts=layouts) for n in itertools.count())
    call = next(call for draw in draws if can_be_copied(call := op.draw(draw, 2_000)))
    tensors = [t if t is None else leaf(t, op.differentiable) for t in call.tensors]
    arguments = tuple(op.lists(tensors))
    torch.library.opcheck(_ops.OPS[name], arguments, call.others, test_utils=ALL_FOUR)


def can_be_copied(call: Call) -> bool:
    """Whether torch can, for opcheck: it finds fewer than no elements in tensors empty twice."""
    return all(t is None or list(t.shape).count(0) < 2 for t in call.tensors)


def leaf(t: Tensor, requires_grad: bool) -> Tensor:
    return t.detach().requires_grad_(requires_grad and t.is_floating_point())


def test_all_four_are_run() -> None:
    assert set(ALL_FOUR) == set(torch.testing._internal.optests.generate_tests.DEFAULT_TEST_UTILS)
