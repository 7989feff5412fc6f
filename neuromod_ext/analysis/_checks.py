"""The errors of the analysis, in the ops' form, and what needs scipy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuromod_ext import _checks


def matrix(op: str, name: str, t: Tensor, symbols: str) -> Tensor:
    """A floating matrix, detached, in float64."""
    _checks.tensors(op, **{name: t})
    _checks._floating(op, name, t)
    _checks._rank(op, name, t, 2, symbols)
    return t.detach().double()


def similarity(op: str, name: str, t: Tensor) -> Tensor:
    """A matrix of similarities of at least two tasks: square, symmetric and finite."""
    t = matrix(op, name, t, "[T, T]")
    if t.shape[0] != t.shape[1] or t.shape[0] < 2:
        raise ValueError(
            f"{op}: expected {name} of shape [T, T] with T >= 2, got {_checks._shape(t.shape)}"
        )
    finite = bool(t.isfinite().all())
    if not finite or not torch.allclose(t, t.mT, rtol=0, atol=1e-5):
        got = "another transpose" if finite else "non-finite entries"
        raise ValueError(f"{op}: expected {name} symmetric and finite, got {got}")
    return t


def units(op: str, name: str, points: Tensor) -> Tensor:
    """Vectors of length 1, float64, in the direction of points of any length but 0, [N, D]."""
    if not points.isfinite().all():
        raise ValueError(f"{op}: expected {name} to be finite, got a NaN or an infinity")
    points = points.detach().double()
    points = points / points.abs().amax(1, keepdim=True)  # so that no square is 0 or infinite
    directions: Tensor = points / points.norm(dim=1, keepdim=True)
    return directions


def scipy(op: str, module: str) -> Any:
    """A module of scipy, which is an optional extra."""
    from importlib import import_module

    try:
        return import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError(
            f"{op}: expected scipy, got none; pip install neuromod_ext[papers]"
        ) from error
