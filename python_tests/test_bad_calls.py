"""Ops refuse bad calls in the documented class and words: kernel, fake and reference alike."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_calls import BAD, GOOD
from conftest import Backend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import neuromod_ext.functional as MF
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


ONE = torch.ones(3, 3)
OPTIONAL = {
    "manifold_linear: expected bias": lambda: MF.manifold_linear(ONE, ONE[None], ONE[:, :1], "a"),
    "manifold_linear_local: expected bias": lambda: MF.manifold_linear_local(
        ONE, ONE[None], torch.zeros(3).long(), ONE[:, :1], 3
    ),
    "manifold_conv2d: expected bias": lambda: MF.manifold_conv2d(
        ONE[None], ONE[None, None, None], ONE[0, :1], 3
    ),
    "gain_linear: expected bias": lambda: MF.gain_linear(ONE, ONE[0], ONE, 1),
    "gain_linear: expected task": lambda: MF.gain_linear(ONE, ONE, ONE, None, 1),
    "manifold_metric: expected weight": lambda: MF.manifold_metric(ONE, [1, 1, 1]),
    "manifold_step_: expected momentum_buffer": lambda: MF.manifold_step_(ONE, ONE, 1, lr=1),
    "manifold_step_: expected metric_inverse": lambda: MF.manifold_step_(ONE, ONE, None, [1], lr=1),
    "manifold_step_foreach_: expected metric_inverses[0]": lambda: MF.manifold_step_foreach_(
        [ONE], [ONE], (), [1], lr=1
    ),
}


@pytest.mark.parametrize("words", OPTIONAL)
def test_optional_arguments_are_tensors(words: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(words)} to be a Tensor, got "):
        OPTIONAL[words]()


def test_a_rate_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"expected lr of one element, got shape \[2\]"):
        MF.manifold_step_foreach_([ONE], [ONE], lr=torch.ones(2))


def test_options_of_a_convolution_are_whole_numbers() -> None:
    with pytest.raises(TypeError, match=r"manifold_conv2d: expected stride of integers, got \[1.5"):
        MF.manifold_conv2d(ONE[None], ONE[None, None, None], ONE[0, :1], stride=1.5)
