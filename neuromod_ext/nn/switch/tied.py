"""torch's layers, whose forward can take its weight between tied points, sample by sample.

Each is a subclass with nothing of its own but ``forward``: while nothing is set around the call it
is torch's layer. :class:`Switchable` sets the points of all layers for the time of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from neuromod_ext import functional


@dataclass
class Ambient:
    """What a layer's call is to use in place of its parameters.

    Attributes:
        points: By name, each parameter in every state, [K, ...].
        coeff: c, [B, K], or [K] for one condition.
        states: [B], where c picks one state for each sample; then only that is computed.
    """

    points: dict[str, Tensor]
    coeff: Tensor
    states: Tensor | None

    def linear(self, input: Tensor, weight: str = "weight", bias: str = "bias") -> Tensor:
        """The linear map of one weight and, where there is one, bias."""
        basis, shift = self.points[weight], self.points.get(bias)
        if self.states is None:
            return functional.manifold_linear(input, basis, self.coeff, shift)
        ones = self.coeff.sum(-1, keepdim=True)  # or NaN, if the state was out of its domain
        return functional.manifold_linear_local(input, basis, self.states, ones, shift)


class Tied(nn.Module):
    """What the layers of a :class:`Switchable` share.

    Attributes:
        ambient: Set for the time of a call.
        state: In which state the parameters are; only those of state 0 can be saved or loaded.
    """

    ambient: Ambient | None = None
    state: int = 0

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._expect_state_0("saving")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._expect_state_0("loading")
        super()._load_from_state_dict(*args, **kwargs)

    def _expect_state_0(self, doing: str) -> None:
        if self.state != 0:
            raise RuntimeError(
                f"Switchable: expected weights in state 0 for {doing}, got state {self.state}; "
                "call switch_back_() first"
            )


class TiedLinear(Tied, nn.Linear):
    """``torch.nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch's, or with the points around the call."""
        return super().forward(input) if self.ambient is None else self.ambient.linear(input)


class _TiedConv(Tied):
    _convolve: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """As torch's, or with the points around the call."""
        conv: Any = self
        if self.ambient is None:
            result: Tensor = super().forward(input)
            return result
        padding = conv.padding
        if conv.padding_mode != "zeros":
            around = conv._reversed_padding_repeated_twice
            input, padding = F.pad(input, around, mode=conv.padding_mode), 0
        points = self.ambient.points
        return type(self)._convolve(
            input,
            points["weight"],
            self.ambient.coeff,
            points.get("bias"),
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
        )


class TiedConv1d(_TiedConv, nn.Conv1d):
    """``torch.nn.Conv1d``."""

    _convolve = staticmethod(functional.manifold_conv1d)


class TiedConv2d(_TiedConv, nn.Conv2d):
    """``torch.nn.Conv2d``."""

    _convolve = staticmethod(functional.manifold_conv2d)


class TiedConv3d(_TiedConv, nn.Conv3d):
    """``torch.nn.Conv3d``."""

    _convolve = staticmethod(functional.manifold_conv3d)
