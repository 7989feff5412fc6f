"""What Switchable refuses, and what it leaves behind."""

import math
import re

import pytest
import torch
from test_switchable import switchable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuromod_ext.nn.switch import Diagonal, Hadamard, Switchable, orthogonal_library


def refusing(model: nn.Module | None = None) -> Switchable:
    return switchable(model or nn.Linear(3, 2))


X = torch.ones(4, 3)
BAD = {
    "nan dose": (lambda s: s(X, math.nan), ValueError, "Dose: expected s in [0, 1], got nan"),
    "infinite dose": (
        lambda s: s(X, torch.tensor([0, 1, math.inf, 0])),
        ValueError,
        "got inf at index 2",
    ),
    "large dose": (lambda s: s(X, 1.5), ValueError, "Dose: expected s in [0, 1], got 1.5"),
    "no such state": (lambda s: s(X, 2), ValueError, "Discrete: expected s"),
    "negative state": (
        lambda s: s(X, torch.tensor([0, 0, 0, -1])),
        ValueError,
        "got -1 at index 3",
    ),
    "too few": (
        lambda s: s(X, torch.rand(3)),
        ValueError,
        "expected coeff of shape [B, K] = [4, 2], got [3, 2]",
    ),
    "complex": (lambda s: s(X, 1j), TypeError, "expected s of a"),
    "switch to 0": (
        lambda s: s.switch_(0),
        ValueError,
        "switch_: expected a state from 1 to 1, got 0",
    ),
    "switch to 2": (
        lambda s: s.switch_(2),
        ValueError,
        "switch_: expected a state from 1 to 1, got 2",
    ),
    "switch twice": (
        lambda s: (s.switch_(), s.switch_()),
        RuntimeError,
        "switch_: expected parameters in state 0, got state 1",
    ),
    "back": (
        lambda s: s.switch_back_(),
        RuntimeError,
        "switch_back_: expected switched parameters, got state 0",
    ),
    "call with a state": (
        lambda s: (s.switch_(), s(X, 1)),
        RuntimeError,
        "expected parameters in state 0 for a call with a state, got state 1",
    ),
    "fold switched": (
        lambda s: (s.switch_(), s.fold(1)),
        RuntimeError,
        "fold: expected parameters in state 0, got state 1",
    ),
    "fold several": (
        lambda s: s.fold(torch.rand(3)),
        ValueError,
        "fold: expected one state or dose, got 3",
    ),
    "no modulator": (
        lambda s: Switchable(nn.Linear(3, 2)),
        ValueError,
        "expected at least one modulator, got none",
    ),
    "a matrix": (
        lambda s: Switchable(nn.Linear(3, 2), torch.eye(6)),
        TypeError,
        "expected modulators, got Tensor",
    ),
    "size": (
        lambda s: Switchable(nn.Linear(3, 2), Hadamard(8, 0)),
        ValueError,
        "expected modulators of 6 weights, got one of 8",
    ),
    "condition": (
        lambda s: Switchable(nn.Linear(1, 2), Diagonal(torch.tensor([1, 1e4]))),
        ValueError,
        "at most 4.1e+03 for weights of float32, got 1e+04",
    ),
    "shift": (
        lambda s: Switchable(nn.Linear(3, 2), Hadamard(6, 0), shift=torch.ones(3)),
        ValueError,
        "expected shift of shape [J, m] = [1, 2]",
    ),
    "nan shift": (
        lambda s: Switchable(nn.Linear(3, 2), Hadamard(6, 0), shift=torch.tensor([0, math.nan])),
        ValueError,
        "expected shift to be finite",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(refusing())
    assert "\n" not in str(caught.value)


def test_doses_of_several_modulators_are_checked() -> None:
    s = Switchable(nn.Linear(3, 2), *orthogonal_library(6, 2, 0))
    assert s(X, torch.tensor([0.25, 0.75])).shape == (4, 2)
    with pytest.raises(ValueError, match=r"Doses: expected s nonnegative and summing to 1, got"):
        s(X, torch.tensor([0.5, 0.75]))
    with pytest.raises(
        ValueError, match=r"expected doses of shape \[..., 2\], one for each modulator"
    ):
        s(X, 0.5)


def test_a_call_in_use_and_an_error_leave_nothing_behind() -> None:

    switch = refusing(nn.Sequential(nn.Linear(3, 2)))
    switch.module.register_forward_hook(lambda m, args, out: switch(X, 1))
    with pytest.raises(RuntimeError, match="layers that no other call is using"):
        switch(X, 1)
    assert switch.module[0].ambient is None
    switch = refusing()
    with pytest.raises(ValueError):
        switch(torch.ones(4, 5), 1)
    assert switch.module.ambient is None


def test_switched_ends_with_the_block_also_after_an_error() -> None:
    switch = refusing()
    with pytest.raises(KeyError), switch.switched() as inside:
        assert inside.state == 1
        raise KeyError
    assert switch.state == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_without_its_state_is_refused(reentrant: bool) -> None:
    class Rerun(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.layer(x).relu(), x, use_reentrant=reentrant)

    switch = Switchable(Rerun(), Hadamard(16, 0))
    x = torch.randn(3, 4, requires_grad=True)
    for state in (1, 0.5, torch.tensor([0, 1, 1])):
        with pytest.raises(RuntimeError, match=r"pass context_fn=model\.checkpoint_contexts"):
            switch(x, state).sum().backward()
    with switch.switched():  # parameters that are there serve a recomputation, too
        switch(x).sum().backward()
