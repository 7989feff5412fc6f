"""What every manifold layer shares: its topology, its basis points, how a condition reaches it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter, init

from neuromod_ext import functional
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext.topology import Topology

Condition = Tensor | float | Sequence[float]
Self = TypeVar("Self", bound="ManifoldLayer")


def conditions(s: Condition, device: torch.device) -> Tensor:
    """Conditions as a tensor; Python's floats are float64, whatever torch's default is."""
    if isinstance(s, Tensor):
        return s
    t = torch.as_tensor(s, device=device)
    return torch.as_tensor(s, dtype=torch.float64, device=device) if t.is_floating_point() else t


class ManifoldLayer(nn.Module, ABC):
    """A layer whose parameters are basis points, [K, ...], of a weight manifold.

    Its parameters bear the topology as their attribute ``manifold``, by which optimizers know the
    metric; copies, conversions and loading keep it.

    Attributes:
        topology: The topology of the manifold.
        weight: P, the basis points of the weight, [K, *shape of the plain layer's weight].
        bias: β, the basis points of the bias, [K, O], or None.
    """

    topology: Topology
    weight: Parameter
    bias: Parameter | None
    ambient_coeff: Tensor | None  # set for the time of a call by Conditioned

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        if not isinstance(topology, Topology):
            raise TypeError(
                f"{type(self).__name__}: expected topology to be a Topology, "
                f"got {type(topology).__name__}; for example neuromod_ext.Ellipse()"
            )
        self.topology = topology
        self.ambient_coeff = None

    def _make_parameters(
        self,
        shape: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Basis points for a plain weight of ``shape``, as many as the topology needs."""
        K = self.topology.num_basis
        self.weight = Parameter(torch.empty(K, *shape, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(torch.empty(K, shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every basis point as torch.nn draws a weight, scaled by 1/√(tr G).

        So the variance of W(s), averaged over the manifold, is that of the plain layer (our
        choice); with one basis point the two are the same.
        """
        scale = 1 / math.sqrt(self.topology.gram().trace().item())
        with torch.no_grad():
            for k in range(len(self.weight)):
                init.kaiming_uniform_(self.weight[k], a=math.sqrt(5))
                if self.bias is not None:
                    fan_in = self.weight[k, 0].numel()
                    bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
                    init.uniform_(self.bias[k], -bound, bound)
            self.weight.mul_(scale)
            if self.bias is not None:
                self.bias.mul_(scale)

    def coefficients(self, s: Condition | None, coeff: Tensor | None) -> Tensor:
        """The coefficients a call uses: its ``coeff``, those of its ``s``, or those set around it.

        Raises:
            ValueError: None of these, or both of the first two, were given.
        """
        name = type(self).__name__
        if s is not None and coeff is not None:
            raise ValueError(f"{name}: expected either s or coeff, got both")
        if s is not None:
            coeff = self.topology(conditions(s, self.weight.device))
        elif coeff is None:
            coeff = self.ambient_coeff
        if coeff is None:
            raise ValueError(
                f"{name}: expected a condition, got none; pass s or coeff, or call the model "
                "through neuromod_ext.Conditioned (under activation checkpointing, with its "
                "checkpoint_contexts)"
            )
        return coeff.to(accumulation_dtype(self.weight.dtype))

    @abstractmethod
    def _plain(self) -> nn.Module:
        """An ordinary layer of the same arguments, its parameters on the meta device."""

    @torch.no_grad()
    def fold(self, s: Condition | None = None, *, coeff: Tensor | None = None) -> nn.Module:
        """The ordinary torch.nn layer at one condition.

        Args:
            s: One condition.
            coeff: Its coefficients instead, [K].

        Raises:
            ValueError: Not exactly one condition.
        """
        coeff = self.coefficients(s, coeff)
        if coeff.dim() != 1:
            raise ValueError(
                f"{type(self).__name__}.fold: expected one condition, got {len(coeff)}; "
                "fold one at a time"
            )
        coeff = coeff.to(self.weight.device)
        plain = self._plain().to_empty(device=self.weight.device).to(self.weight.dtype)
        plain.train(self.training)
        for name, _ in list(plain.named_parameters(recurse=False)):
            basis = getattr(self, name)  # a parameter, or what a parametrization makes of one
            point = Parameter(functional.interpolate_weights(basis, coeff), basis.requires_grad)
            plain.register_parameter(name, point)
        return plain

    @torch.no_grad()
    def _embed(self, plain: nn.Module) -> None:
        """Set the basis points so that every point of the manifold is ``plain``."""
        constant = self.topology.constant()
        for name, basis in self.named_parameters(recurse=False):
            point = plain.get_parameter(name)
            a = constant.to(basis.device, accumulation_dtype(basis.dtype))
            basis.copy_(a.view(-1, *[1] * point.dim()) * point)

    def _flagged_as(self: Self, plain: nn.Module) -> Self:
        """In training, and with frozen parameters, where an ordinary layer is."""
        for name, basis in self.named_parameters(recurse=False):
            basis.requires_grad_(plain.get_parameter(name).requires_grad)
        return self.train(plain.training)

    # Every way a parameter can come into the module ends in one of these five.

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark_parameters()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ManifoldLayer:
        super()._apply(fn, recurse)
        self._mark_parameters()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_parameters()

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """As of any module; originals of a parametrization keep their mark, too."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        for old, new in zip(self.parameters(), made.parameters(), strict=True):
            if hasattr(old, "manifold"):
                new.manifold = made.topology  # type: ignore[attr-defined]
        return made

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.manifold = self.topology  # type: ignore[attr-defined]
