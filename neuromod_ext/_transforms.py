"""What surrounds a call: the one place that asks torch's internals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transform_active() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp …) surrounds the caller.

    torch has no public way to ask; a test pins this one.
    """
    return torch._C._are_functorch_transforms_active()


def tangents_active() -> bool:
    """Whether tensors may carry tangents: the caller is within a forward-mode ``dual_level``.

    torch has no public way to ask; a test pins this one.
    """
    return forward_ad._current_level >= 0


def surrounded() -> bool:
    """Whether a ``torch.func`` transform or a ``dual_level`` surrounds the caller."""
    if transform_active():
        return True
    return not torch.compiler.is_compiling() and tangents_active()


def refuse_transforms(op: str) -> None:
    """Refuse to change operands in place under a ``torch.func`` transform.

    Raises:
        NotImplementedError: One surrounds the caller.
    """
    if transform_active():
        raise NotImplementedError(
            f"{op}: expected no torch.func transform around it, got one; it works in place and "
            "is not differentiable"
        )


def low_precision(device: torch.device, *operands: Tensor | None) -> list[Any]:
    """The operands in the dtype that autocast asks for on a device; float64 stays."""
    dtype = torch.get_autocast_dtype(device.type)
    low = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in low else t for t in operands]


def size_left_open(size: int) -> bool:
    """Whether ``torch.compile`` or ``torch.export`` traces for any value of a size."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return not has_static_value(size)
