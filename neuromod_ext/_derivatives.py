"""Derivatives of the ops that come with a fused gradient, in eager and in compiled code.

Such an op, ``name``, has a twin ``name_backward`` that yields all gradients at once, but cannot be
differentiated in turn; where that is asked for, a formula of other ops takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from neuromod_ext._contraction import NODES, Contract, contract, registered
from neuromod_ext._ops import EXTENSION, OPS
from neuromod_ext.reference import Form

Gradients = Sequence[Tensor | None]
# Of the arguments of the op, the gradient of its result, and which gradients are needed: those
# gradients, by the given way to contract a form.
Formula = Callable[[Contract, Sequence[Any], Tensor, Sequence[bool]], Gradients]

FORMULAS: dict[str, tuple[tuple[int, ...], Formula]] = {}


def differentiable(name: str, positions: tuple[int, ...], formula: Formula) -> None:
    """Make the op ``name`` differentiable in its arguments at ``positions``."""
    FORMULAS[name] = positions, formula
    if EXTENSION:
        NODES[name] = node("neuromod_ext", name)
        _register(name, positions, formula)


def node(namespace: str, name: str) -> Callable[..., Tensor]:
    """The op of a namespace as a node of the graph of eager code, made without Python.

    Not for a call that a transform or tangents surround: such a node maps and moves nothing.
    """
    from neuromod_ext import _C

    positions, formula = FORMULAS[name]

    def eager(args: Sequence[Any], grad: Tensor, needed: Sequence[bool]) -> Gradients:
        return formula(contract, args, grad, needed)

    return cast(
        Callable[..., Tensor], _C.fused_function(f"{namespace}::{name}", list(positions), eager)
    )


def _register(name: str, positions: tuple[int, ...], formula: Formula) -> None:
    """The derivative of the registered op, which compiled code calls."""
    length = len(torch._C._get_schema(f"neuromod_ext::{name}", "").arguments)
    fused = f"{name}_backward"
    masked = len(torch._C._get_schema(f"neuromod_ext::{fused}", "").arguments) > 1 + length

    def call(form: Form, result: str, *values: Tensor) -> Tensor:
        return cast(Tensor, registered(form.ops[result][0], *values))

    def padded(values: Iterable[Any]) -> list[Any]:  # torch leaves default arguments out
        return [*values, *[None] * length][:length]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.options, strict=True)
        args = padded(option if tensor is None else tensor for tensor, option in pairs)
        needs = padded(ctx.needs_input_grad)
        needed = [bool(needs[i]) for i in positions]
        if torch.is_grad_enabled():
            grads = formula(call, args, grad, needed)
        elif masked:
            grads = OPS[fused](grad, *args, needed)
        else:
            grads = (OPS[fused](grad, *args),)
        results: list[Tensor | None] = [None] * length
        for i, need, found in zip(positions, needed, grads, strict=True):
            results[i] = found if need else None
        return tuple(results[: len(ctx.needs_input_grad)])

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(
            f"{fused}: expected no derivative of this op to be asked for; differentiate {name} "
            "with create_graph=True"
        )

    torch.library.register_autograd(f"neuromod_ext::{name}", backward, setup_context=save)
    torch.library.register_autograd(f"neuromod_ext::{fused}", refuse)
