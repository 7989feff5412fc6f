"""Tensors as one vector of their elements, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copied(parts: Sequence[Tensor]) -> Tensor:
    """The elements of some tensors, one after the other, in memory of their own."""
    return torch.cat([part.detach().flatten() for part in parts])


def write(parts: Sequence[Tensor], values: Tensor) -> None:
    """Set the elements of some tensors, in place."""
    split = values.split([part.numel() for part in parts])
    for part, new in zip(parts, split, strict=True):
        if new.data_ptr() != part.data_ptr():  # else it was overwritten
            part.copy_(new.view(part.shape))
