"""Ops refuse bad calls in the documented class and words: kernel, fake and reference alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_calls import BAD, GOOD
from conftest import Backend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from neuromod_ext import _ops, reference

ROWS = [
    pytest.param(name, *row[1:], id=f"{name}-{row[0]}")
    for name, rows in BAD.items()
    for row in rows
]


def refusal(function: Callable[..., Any], arguments: dict[str, Any]) -> Exception:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        function(**arguments)
    return caught.value


@pytest.mark.parametrize("name", _ops.NAMES)
def test_at_least_ten(name: str) -> None:
    assert len(BAD[name]) >= 10
    assert len({row[0] for row in BAD[name]}) == len(BAD[name])
    for function in (_ops.OPS[name], getattr(reference, name)):
        function(**tree_map_only(torch.Tensor, torch.clone, GOOD[name]))


@pytest.mark.parametrize(("name", "change", "error", "words"), ROWS)
def test_op(name: str, change: dict[str, Any], error: type, words: str, backend: Backend) -> None:
    """The kernel refuses, and leaves what it would have changed as it was."""
    arguments = tree_map_only(
        torch.Tensor,
        lambda t: t if t.is_meta else t.to(backend.device, copy=True),
        GOOD[name] | change,
    )
    tensors = [t for t in tree_leaves(arguments) if torch.is_tensor(t)]
    if backend.name == "emulated" and any(t.is_meta for t in tensors):
        pytest.skip("the emulated library registers no fakes, which is where such a call goes")
    before = [t.clone() for t in tensors if not t.is_meta]
    caught = refusal(backend.op(name), arguments)
    words = words.replace("on cpu", f"on {torch.empty(0, device=backend.device).device}")
    assert type(caught) is error
    assert str(caught).startswith(f"{name}: expected {words}")
    for t, value in zip((t for t in tensors if not t.is_meta), before, strict=True):
        assert torch.equal(t, value)


@pytest.mark.parametrize(("name", "change", "error", "words"), ROWS)
def test_same_words(name: str, change: dict[str, Any], error: type, words: str) -> None:
    """Fake and reference say what the kernel says, to the letter."""
    arguments = GOOD[name] | change
    told = str(refusal(_ops.OPS[name], arguments))
    by_reference = refusal(getattr(reference, name), arguments)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        by_fake = refusal(_ops.OPS[name], fakes)
    for caught in (by_reference, by_fake):
        assert type(caught) is error
        assert str(caught) == told
