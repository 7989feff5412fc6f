"""torch's layers, whose forward can take its weight between tied points, sample by sample.

Each is a subclass with nothing of its own but ``forward``: while nothing is set around the call it
is torch's layer. :class:`Switchable` sets the points of all layers for the time of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromod_ext import functional
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext._transforms import surrounded, transform_active
from neuromod_ext.nn.switch.modulator import Modulator

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
class Gained:
    """A weight whose states differ in a gain of each row, which its outputs can have as well.

    So one product serves the samples of all states and doses.

    Attributes:
        weight: In state 0, [O, ...].
        gains: Of each row in every state, [K, O].
    """

    weight: Tensor
    gains: Tensor

    @classmethod
    def of(cls, weight: Tensor, modulators: Sequence[Modulator | Tensor]) -> Gained | None:
        """What modulators make of a weight, if each of them is a gain of its rows."""
        gains = [m.row_gain(weight.shape) for m in modulators if isinstance(m, Modulator)]
        found = [gain for gain in gains if gain is not None]
        if len(found) < len(modulators):
            return None
        in_states = torch.stack([torch.ones_like(found[0]), *found])
        return cls(weight, in_states.to(accumulation_dtype(weight.dtype)))

    def basis(self) -> Tensor:
        """The weight in every state, [K, O, ...], as modulators would give it."""
        gains = self.gains.view(*self.gains.shape, *(1,) * (self.weight.dim() - 1))
        return (self.weight.to(gains.dtype) * gains).to(self.weight.dtype)

    def scaled(self, product: Tensor, coeff: Tensor, shift: Tensor | None, inner: int) -> Tensor:
        """The layer's output, each sample in its state.

        Args:
            product: What the weight makes of the input, [B, ..., O, ...]; overwritten.
            coeff: c, [B, K], or [K] for one condition.
            shift: The bias in every state, [K, O].
            inner: How many dimensions follow the neurons'.

        Raises:
            ValueError: c is not for as many samples.
        """
        if coeff.dim() == 2 and product.shape[: product.dim() - inner - 1][:1] != coeff.shape[:1]:
            raise ValueError(
                f"Switchable: expected a batch of {len(coeff)} samples, one for each state or "
                f"dose, got a layer's output of shape {list(product.shape)}"
            )

        def of_samples(basis: Tensor) -> Tensor:
            mixed = functional.interpolate_weights(basis, coeff)
            around = product.dim() - mixed.dim() - inner
            *samples, neurons = mixed.shape
            return mixed.view(*samples, *(1,) * around, neurons, *(1,) * inner)

        gain, dtype = of_samples(self.gains), product.dtype
        if surrounded():  # c may then have what the product has not: a dimension, a tangent
            scaled = product * gain
            return (scaled if shift is None else scaled + of_samples(shift)).to(dtype)
        scaled = product.mul_(gain)
        return scaled if shift is None else scaled.add_(of_samples(shift))


@dataclass(frozen=True)
class Points:
    """A layer's parameters in every state, by name: those of state 0 are the layer's own."""

    weights: dict[str, tuple[Tensor, ...] | Gained] = field(default_factory=dict)
    biases: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def only_gained(self) -> bool:
        """Whether no weight needs the samples of a state apart from others."""
        return all(isinstance(weight, Gained) for weight in self.weights.values())

    def stacked(self) -> dict[str, Tensor]:
        """Each of them as one tensor, [K, ...]."""
        every = {**self.weights, **self.biases}
        return {n: p.basis() if isinstance(p, Gained) else torch.stack(p) for n, p in every.items()}


@dataclass(frozen=True)
class Ambient:
    """What a layer's call is to use in place of its parameters.

    Attributes:
        points: Its parameters in every state.
        coeff: c, [B, K], or [K] for one condition.
        states: [B], where c picks one state for each sample; then only that is computed.
        groups: The same samples sorted, if they can be.
        alone: The one state of all samples of this call, if it is known.
    """

    points: Points
    coeff: Tensor
    states: Tensor | None
    groups: Groups | None
    alone: int | None = None

    def linear(self, input: Tensor, weight: str = "weight", bias: str = "bias") -> Tensor:
        """The linear map of one weight and, where there is one, bias."""

        def tied(input: Tensor, basis: Tensor, shift: Tensor | None) -> Tensor:
            if self.states is None:
                return functional.manifold_linear(input, basis, self.coeff, shift)
            ones = self.coeff.sum(-1, keepdim=True)  # or NaN, if the state was out of its domain
            return functional.manifold_linear_local(input, basis, self.states, ones, shift)

        return self.run(F.linear, tied, input, math.prod(input.shape[1:-1]), 0, weight, bias)

    def run(
        self,
        plain: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        tied: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        input: Tensor,
        uses: int,
        inner: int,
        weight: str = "weight",
        bias: str = "bias",
    ) -> Tensor:
        """A layer's output, by the way that serves it best.

        Args:
            plain: The layer as a function of input, weight and bias.
            tied: The same of input, weight and bias in every state.
            input: Its input.
            uses: How often a sample meets each number of the weight; 0 without a batch.
            inner: How many dimensions of the output follow the neurons'.
            weight: A parameter's name.
            bias: Likewise; there may be none.
        """
        weights, biases = self.points.weights[weight], self.points.biases.get(bias)
        if isinstance(weights, Gained):
            shift = None if biases is None else torch.stack(biases)
            return weights.scaled(plain(input, weights.weight, None), self.coeff, shift, inner)

        def in_state(k: int, x: Tensor) -> Tensor:
            return plain(x, weights[k], None if biases is None else biases[k])

        if self.alone is not None:
            return in_state(self.alone, input)
        if self.groups is not None and self.groups.serve(input, uses * weights[0].numel()):
            return self.groups.each(in_state, input)
        return tied(input, torch.stack(weights), None if biases is None else torch.stack(biases))


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

    def _expect_no_backward(self) -> None:
        """Without points around it, a call in a backward pass is one made again, in another state.

        Parameters that are switched in place are in their state then, too.
        """
        compiled = torch.compiler.is_compiling()
        if not compiled and self.state == 0 and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "Switchable: expected the state of the first run in a recomputation, got none; "
                "pass context_fn=model.checkpoint_contexts and use_reentrant=False to "
                "torch.utils.checkpoint"
            )

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
        if self.ambient is None:
            self._expect_no_backward()
            return super().forward(input)
        return self.ambient.linear(input)


class _TiedConv(Tied):
    _convolve: Callable[..., Tensor]
    _plain: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """As torch's, or with the points around the call."""
        conv: Any = self
        ambient = self.ambient
        if ambient is None:
            self._expect_no_backward()
            result: Tensor = super().forward(input)
            return result
        padding = conv.padding
        if conv.padding_mode != "zeros":
            around = conv._reversed_padding_repeated_twice
            input, padding = F.pad(input, around, mode=conv.padding_mode), 0
        walk = (conv.stride, padding, conv.dilation, conv.groups)

        def plain(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return type(self)._plain(input, weight, bias, *walk)

        def tied(input: Tensor, basis: Tensor, shift: Tensor | None) -> Tensor:
            return type(self)._convolve(input, basis, ambient.coeff, shift, *walk)

        inner = len(conv.stride)
        pixels = math.prod(input.shape[2:]) // math.prod(conv.stride)
        return ambient.run(plain, tied, input, pixels * (input.dim() == inner + 2), inner)


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
