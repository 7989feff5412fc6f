"""The metric of a manifold as training sees it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neuromod_ext import functional
from neuromod_ext.topology import Topology


class EmpiricalMetric:
    r"""A running average of the Gram matrix over the conditions seen in training.

    .. math:: \bar G \leftarrow \beta \bar G + (1 - \beta) \frac1B \sum_b c_b c_b^\top, \qquad
              \hat G = \bar G / (1 - \beta^t)

    Use it where conditions do not come from the topology's density. Call :meth:`update` with the
    conditions of each batch, and hand the object to an optimizer as ``metric``. Under
    ``torch.distributed`` each update is averaged over all ranks.

    Args:
        topology: The topology whose metric this is.
        decay: β, in [0, 1); 0 takes each batch by itself.
        damping: δ ≥ 0: Ĝ + δ (tr Ĝ / K) 1 is what is inverted, since few conditions may not span
            all directions (our choice).

    Raises:
        ValueError: ``decay`` or ``damping`` out of its range.
    """

    def __init__(self, topology: Topology, *, decay: float = 0.99, damping: float = 1e-3) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EmpiricalMetric: expected decay in [0, 1), got {decay}")
        if not 0 <= damping < float("inf"):
            raise ValueError(f"EmpiricalMetric: expected damping >= 0 and finite, got {damping}")
        self.topology = topology
        self.decay = decay
        self.damping = damping
        self._average = torch.zeros(topology.num_basis, topology.num_basis, dtype=torch.float64)
        self._mass = 0.0  # 1 - decay ** updates

    @torch.no_grad()
    def update(self, s: Tensor | None = None, *, coeff: Tensor | None = None) -> None:
        """Take in the conditions of one batch.

        Args:
            s: The conditions.
            coeff: Their coefficients instead, [B, K].

        Raises:
            ValueError: Not exactly one of both, no sample, or another number of coefficients.
        """
        if (s is None) == (coeff is None):
            got = "neither" if s is None else "both"
            raise ValueError(f"EmpiricalMetric.update: expected either s or coeff, got {got}")
        if s is not None:
            coeff = self.topology(s)
        assert coeff is not None
        K = self.topology.num_basis
        if coeff.dim() == 0 or coeff.shape[-1] != K:
            raise ValueError(
                f"EmpiricalMetric.update: expected coeff of shape [B, K] = [B, {K}], "
                f"got {list(coeff.shape)}"
            )
        gram = functional.manifold_metric(coeff.reshape(-1, coeff.shape[-1]))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gram)
            gram = gram / dist.get_world_size()
        self._average = self._average.to(gram.device)
        self._average.lerp_(gram.to(torch.float64), 1 - self.decay)
        self._mass = self.decay * self._mass + (1 - self.decay)

    def gram(self) -> Tensor:
        """Ĝ, [K, K], float64.

        Raises:
            RuntimeError: No condition was seen yet.
        """
        if self._mass == 0:
            raise RuntimeError(
                "EmpiricalMetric: expected update(s) with a batch's conditions before the first "
                "step, got no condition"
            )
        return self._average / self._mass

    def inverse(self) -> Tensor:
        """The inverse of the damped Ĝ, [K, K], float64.

        Raises:
            RuntimeError: No condition was seen yet.
            ValueError: The damped matrix is singular.
        """
        gram = self.gram()
        scale = self.damping * gram.trace() / len(gram)
        damped = gram + scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info.item() != 0:
            raise ValueError(
                "EmpiricalMetric: expected conditions that span all basis functions, got a "
                f"singular metric; raise damping above {self.damping}"
            )
        return torch.cholesky_inverse(factor)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` restores."""
        return {"average": self._average.clone(), "mass": self._mass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average.

        Raises:
            ValueError: It is of another number of basis points.
        """
        if state["average"].shape != self._average.shape:
            raise ValueError(
                f"EmpiricalMetric: expected an average of shape {list(self._average.shape)}, "
                f"got {list(state['average'].shape)}"
            )
        self._average = state["average"].clone()
        self._mass = state["mass"]
