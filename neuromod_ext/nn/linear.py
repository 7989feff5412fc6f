"""The manifold counterpart of ``torch.nn.Linear``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuromod_ext import functional
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext.nn._layer import Condition, ManifoldLayer
from neuromod_ext.topology import Topology


class ManifoldLinear(ManifoldLayer):
    r"""A linear layer whose weight is picked on a manifold by each sample's condition.

    .. math:: y_b = W(s_b)\, x_b + \beta(s_b), \qquad W(s) = \sum_k c_k(s) P_k

    Args:
        in_features: I.
        out_features: O.
        bias: Whether there is a bias, with basis points of its own.
        device: As in torch.nn.
        dtype: As in torch.nn.
        topology: The topology, which maps conditions to coefficients.

    Shapes: ``weight`` [K, O, I], ``bias`` [K, O], input [B, ..., I], output [B, ..., O].

    Raises:
        TypeError: ``topology`` is none.

    Source: Benjamin et al., "Walking the Weight Manifold".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        topology: Topology,
    ) -> None:
        super().__init__(topology)
        self.in_features = in_features
        self.out_features = out_features
        self._make_parameters((out_features, in_features), bias, device, dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, topology: Topology) -> ManifoldLinear:
        """A manifold around a trained layer: every condition begins with its weight.

        Raises:
            ValueError: No constant function is in the span of the topology's coefficients.
        """
        layer = cls._like(linear, topology)
        layer._embed(linear)
        return layer

    @classmethod
    def _like(cls, linear: nn.Linear, topology: Topology) -> ManifoldLinear:
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            linear.weight.device,
            linear.weight.dtype,
            topology=topology,
        )._flagged_as(linear)

    def forward(
        self, input: Tensor, s: Condition | None = None, *, coeff: Tensor | None = None
    ) -> Tensor:
        """Apply the layer.

        Args:
            input: x, [B, ..., I].
            s: The conditions, one a sample, or one for all: see the topology for shape and unit.
            coeff: Their coefficients instead, [B, K] or [K], computed once for many layers.

        Returns:
            y, [B, ..., O].

        Raises:
            ValueError: No condition, a shape that does not fit, a condition out of its domain.
            TypeError: A dtype that does not fit.
        """
        if coeff is None and isinstance(s, Tensor) and self._acts_locally(input, s):
            index, local = self.topology.local(s)
            local = local.to(accumulation_dtype(self.weight.dtype))
            return functional.manifold_linear_local(input, self.weight, index, local, self.bias)
        coeff = self.coefficients(s, coeff)
        return functional.manifold_linear(input, self.weight, coeff, self.bias)

    def _acts_locally(self, input: Tensor, s: Tensor) -> bool:
        """Whether each sample has a condition of its own, at which few basis points act."""
        if self.topology.num_local == self.topology.num_basis:
            return False
        batch = s.shape[: s.dim() - len(self.topology.condition_shape)]
        return len(batch) == 1 and batch[0] != 1 and input.dim() > 1 and input.shape[0] == batch[0]

    def _plain(self) -> nn.Linear:
        has_bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, has_bias, device="meta")

    def extra_repr(self) -> str:
        """The arguments, as torch.nn prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, topology={self.topology!r}"
        )
