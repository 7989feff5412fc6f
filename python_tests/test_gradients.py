"""Derivatives against finite differences: reverse, forward, batched and second order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compositions import Composition, every
from entry import Call
from op_entries import OPS
from sampling import Draw
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from neuromod_ext import _ops, autograd
from neuromod_ext.reference import INTERPOLATE_WEIGHTS, MANIFOLD_LINEAR

QUICK, FULL = 1, 10  # second derivatives of convolutions take seconds
SEEDS = [pytest.param(i, marks=pytest.mark.full if i >= QUICK else []) for i in range(FULL)]
FORMS = {
    name: (form, result)
    for form in (MANIFOLD_LINEAR, INTERPOLATE_WEIGHTS)
    for result, (name, _) in form.ops.items()
}


def leaves(args: Any) -> tuple[Tensor, ...]:
    return tuple(
        t.detach().clone().requires_grad_(t.is_floating_point()) for t in args if t is not None
    )


def verify(function: Callable[..., Tensor], args: tuple[Tensor, ...], forward: bool = True) -> None:
    assert gradcheck(
        function,
        args,
        nondet_tol=0.0,
        check_forward_ad=forward,
        check_batched_grad=True,
        check_batched_forward_grad=forward,
    )
    assert gradgradcheck(
        function,
        args,
        nondet_tol=0.0,
        check_fwd_over_rev=forward,
        check_rev_over_rev=True,
        check_batched_grad=False,
    )


@pytest.mark.parametrize("i", SEEDS)
@every
def test_public(entry: Composition, i: int) -> None:
    """Functions and modules, as a user calls them."""
    draw = Draw(f"{entry.id}/{i}")
    verify(entry.call, leaves(entry.make(draw, draw.pick(1, 2, 3))))


def small(name: str, i: int) -> Call:
    """A call whose operands have a few dozen elements; some of them are empty."""
    for attempt in range(100):
        call = OPS[name].draw(Draw(f"gradients/{name}/{i}/{attempt}"), 150)
        if sum(t.numel() for t in call.tensors if t is not None) <= 120:
            return call
    raise AssertionError("no small operands")


@pytest.mark.parametrize("i", SEEDS)
@pytest.mark.parametrize("name", sorted(FORMS))
def test_contraction(name: str, i: int) -> None:
    """Each contraction of a form: what derivatives of every order are made of."""
    form, result = FORMS[name]
    operands = len(form.operands(result))
    args = leaves(small(name, i).tensors)[:operands]
    verify(lambda *args: autograd.contract(form, result, *args), args)


@pytest.mark.parametrize("i", SEEDS)
@pytest.mark.parametrize("name", [name for name in _ops.NAMES if OPS[name].differentiable])
def test_registered(name: str, i: int) -> None:
    """The formulas that compiled code uses; torch knows no forward mode for registered ops."""
    call = small(name, i)

    def function(*args: Tensor) -> Tensor:
        given = iter(args)
        tensors = [None if t is None else next(given) for t in call.tensors]
        return _ops.OPS[name](*tensors, **call.others)

    args = leaves(call.tensors)
    assert gradcheck(function, args, nondet_tol=0.0)
    assert gradgradcheck(function, args, nondet_tol=0.0)


@every
def test_only_what_is_asked_for(entry: Composition) -> None:
    """Operands that need no gradient get none, and change nothing for the others."""
    args = entry.make(Draw(entry.id), 3)
    everything = leaves(args)
    want = torch.autograd.grad(entry.call(*everything).sin().sum(), everything)
    for i in range(len(args)):
        inputs = [t.detach().clone().requires_grad_(j == i) for j, t in enumerate(args)]
        entry.call(*inputs).sin().sum().backward()
        assert [t.grad is not None for t in inputs] == [j == i for j in range(len(args))]
        torch.testing.assert_close(inputs[i].grad, want[i], rtol=1e-12, atol=1e-12)
    assert not entry.call(*args).requires_grad
