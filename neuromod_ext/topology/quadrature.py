"""Quadrature rules: nodes and weights, float64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rule = tuple[Tensor, Tensor]  # nodes and weights


def gauss(n: int) -> Rule:
    """Return Gauss-Legendre on [0, 1], exact for polynomials of degree 2n - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((1 + nodes) / 2), torch.from_numpy(weights / 2)


def equispaced(n: int) -> Rule:
    """Return equal steps round the circle, exact for harmonics below n."""
    nodes = torch.arange(n, dtype=torch.float64, device="cpu") / n
    return nodes, torch.full_like(nodes, 1 / n)


def grid(rules: Sequence[Rule]) -> Rule:
    """Return all combinations of nodes, [n, d], with the products of their weights."""
    nodes, weights = columns(rules[0][0]), rules[0][1]
    for x, w in rules[1:]:
        pair = nodes.repeat_interleave(len(x), 0), columns(x).repeat(len(nodes), 1)
        nodes = torch.cat(pair, -1)
        weights = torch.kron(weights, w)
    return nodes, weights


def columns(nodes: Tensor) -> Tensor:
    """Return nodes as [n, d], where scalars are [n]."""
    return nodes.unsqueeze(-1) if nodes.ndim == 1 else nodes


def float64(values: Sequence[Any]) -> Tensor:
    """Return numbers as a tensor in which rules are computed."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
