"""What surrounds a call: the one place that asks torch's internals."""

from __future__ import annotations

import torch
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


def size_left_open(size: int) -> bool:
    """Whether ``torch.compile`` or ``torch.export`` traces for any value of a size."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return not has_static_value(size)
