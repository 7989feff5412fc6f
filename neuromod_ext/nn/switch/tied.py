"""torch's layers, whose forward can take its weight between tied points, sample by sample.

Each is a subclass with nothing of its own but ``forward``: while nothing is set around the call it
is torch's layer. :class:`Switchable` sets the points of all layers for the time of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromod_ext import functional
from neuromod_ext._transforms import transform_active

WORTH_SORTING = 2**19  # multiplications of a state's samples: to sort them takes some 10 us


@dataclass(frozen=True)
class Groups:
    """The samples of a batch, sorted by state.

    Attributes:
        order: The samples of state 0, then those of state 1, and so on, [B].
        back: Where each sample stands in ``order``, [B].
        counts: How many samples each state has.
    """

    order: Tensor
    back: Tensor
    counts: list[int]

    @classmethod
    def of(cls, states: Tensor, num_states: int) -> Groups | None:
        """Sort samples, where that needs no waiting for a device and no fixed shapes."""
        if states.device.type != "cpu" or torch.compiler.is_compiling() or transform_active():
            return None
        counts = torch.bincount(states, minlength=num_states).tolist()
        order = states.argsort(stable=True)
        return cls(order, order.argsort(), counts)

    def serve(self, input: Any, work: int) -> bool:
        """Whether they are an input's samples, and worth sorting: so many products a sample."""
        if not isinstance(input, Tensor) or input.shape[:1] != self.order.shape:
            return False
        present = sum(map(bool, self.counts))
        return len(self.order) * work >= WORTH_SORTING * present

    def each(self, function: Callable[[int, Tensor], Tensor], input: Tensor) -> Tensor:
        """``function(k, x)`` for the samples x of each state k; results in the batch's order."""
        present = [k for k, count in enumerate(self.counts) if count]
        if len(present) == 1:
            return function(present[0], input)
        inputs = input.index_select(0, self.order).split(self.counts)
        return torch.cat([function(k, inputs[k]) for k in present]).index_select(0, self.back)


@dataclass(frozen=True)
class Ambient:
    """What a layer's call is to use in place of its parameters.

    Attributes:
        points: By name, each parameter in every state.
        coeff: c, [B, K], or [K] for one condition.
        states: [B], where c picks one state for each sample; then only that is computed.
        groups: The same samples sorted, if they can be.
        alone: The one state of all samples of this call, if it is known.
    """

    points: dict[str, tuple[Tensor, ...]]
    coeff: Tensor
    states: Tensor | None
    groups: Groups | None
    alone: int | None = None

    def basis(self, name: str) -> Tensor | None:
        """A parameter in every state, [K, ...]; None if the layer has none of that name."""
        return torch.stack(self.points[name]) if name in self.points else None

    def linear(self, input: Tensor, weight: str = "weight", bias: str = "bias") -> Tensor:
        """The linear map of one weight and, where there is one, bias."""
        tokens = math.prod(input.shape[1:-1])
        if self.sorts(input, tokens * self.points[weight][0].numel()):
            return self.by_state(F.linear, input, weight, bias)
        basis, shift = self.basis(weight), self.basis(bias)
        assert basis is not None
        if self.states is None:
            return functional.manifold_linear(input, basis, self.coeff, shift)
        ones = self.coeff.sum(-1, keepdim=True)  # or NaN, if the state was out of its domain
        return functional.manifold_linear_local(input, basis, self.states, ones, shift)

    def sorts(self, input: Tensor, work: int) -> bool:
        """Whether :meth:`by_state` serves a layer of so many multiplications a sample best."""
        if self.alone is not None:
            return True
        return self.groups is not None and self.groups.serve(input, work)

    def by_state(
        self, function: Callable[..., Tensor], input: Tensor, weight: str, bias: str
    ) -> Tensor:
        """A function of input, weight and bias, called for the samples of each state at once."""
        weights = self.points[weight]
        shifts = self.points.get(bias, (None,) * len(weights))

        def in_state(k: int, x: Tensor) -> Tensor:
            return function(x, weights[k], shifts[k])

        if self.alone is not None:
            return in_state(self.alone, input)
        assert self.groups is not None
        return self.groups.each(in_state, input)


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
    _plain: Callable[..., Tensor]

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
        walk = (conv.stride, padding, conv.dilation, conv.groups)
        pixels = math.prod(input.shape[2:]) // math.prod(conv.stride)
        if input.dim() == len(conv.stride) + 2 and self.ambient.sorts(
            input, pixels * conv.weight.numel()
        ):
            plain = partial(
                type(self)._plain,
                stride=conv.stride,
                padding=padding,
                dilation=conv.dilation,
                groups=conv.groups,
            )
            return self.ambient.by_state(plain, input, "weight", "bias")
        basis, shift = self.ambient.basis("weight"), self.ambient.basis("bias")
        return type(self)._convolve(input, basis, self.ambient.coeff, shift, *walk)


class TiedConv1d(_TiedConv, nn.Conv1d):
    """``torch.nn.Conv1d``."""

    _convolve = staticmethod(functional.manifold_conv1d)
    _plain = staticmethod(F.conv1d)


class TiedConv2d(_TiedConv, nn.Conv2d):
    """``torch.nn.Conv2d``."""

    _convolve = staticmethod(functional.manifold_conv2d)
    _plain = staticmethod(F.conv2d)


class TiedConv3d(_TiedConv, nn.Conv3d):
    """``torch.nn.Conv3d``."""

    _convolve = staticmethod(functional.manifold_conv3d)
    _plain = staticmethod(F.conv3d)
