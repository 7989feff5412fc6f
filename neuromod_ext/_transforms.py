"""What surrounds a call: the one place that asks torch's internals."""

from __future__ import annotations

import torch


def transform_active() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp …) surrounds the caller.

    torch has no public way to ask; a test pins this one.
    """
    return torch._C._are_functorch_transforms_active()
