"""What layers are to use for the time of a block: an attribute of each, set around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def restored(name: str, values: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Give an attribute of some modules the values it had, and afterwards those it has now.

    Args:
        name: The attribute's.
        values: The modules, each with its value.
    """
    before = [getattr(module, name) for module, _ in values]
    for module, value in values:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, _), value in zip(values, before, strict=True):
            setattr(module, name, value)
