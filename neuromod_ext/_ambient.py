"""What layers are to use for the time of a block: an attribute of each, set around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LOCK = threading.Lock()


def claim(name: str, values: Sequence[tuple[nn.Module, Any]]) -> bool:
    """Give an attribute of some modules their values, unless one of them has one already.

    Args:
        name: The attribute's, None where it has no value.
        values: The modules, each with its value.

    Returns:
        Whether they have them now; only one of several threads can be told so.
    """
    if torch.compiler.is_compiling():  # by one thread, of code that takes no lock
        return _claim(name, values)
    with _LOCK:
        return _claim(name, values)


def _claim(name: str, values: Sequence[tuple[nn.Module, Any]]) -> bool:
    if any(getattr(module, name) is not None for module, _ in values):
        return False
    for module, value in values:
        setattr(module, name, value)
    return True


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
