"""Layers whose weights are random and fixed: drawn from a seed, or given."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromod_ext import functional
from neuromod_ext.nn.random import _philox

Size = int | tuple[int, int]


class _Fixed(nn.Module):
    """A layer with one tensor that is never trained.

    What is drawn from a seed is not in the state_dict but for the seed: it is drawn again when a
    state_dict is loaded. What was given is there as any buffer.
    """

    _name: ClassVar[str]  # of the tensor

    def _fix(
        self,
        given: Tensor | None,
        seed: int,
        stream: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the tensor; the last thing a constructor does."""
        for name, number in (("seed", seed), ("stream", stream)):
            if not 0 <= number < 2**63:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} in [0, 2**63), got {number}"
                )
        self.seed, self.stream, self.given = seed, stream, given is not None
        if given is None:
            fixed, device = self._drawn(), device or torch.get_default_device()
        else:
            fixed = given.detach().clone()
        self.register_buffer(self._name, fixed.to(device, dtype), persistent=self.given)

    @abstractmethod
    def _drawn(self) -> Tensor: ...

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the tensor again, after ``to_empty`` for example; a given one stays as it is."""
        if not self.given:
            fixed = self.get_buffer(self._name)
            if not fixed.is_meta:
                fixed.copy_(self._drawn())

    def get_extra_state(self) -> Tensor:
        """The seed and the stream; nothing of a tensor that was given."""
        return torch.tensor([] if self.given else [self.seed, self.stream], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Draw the tensor that the seed stands for.

        Raises:
            ValueError: Only one of the two was drawn from a seed.
        """
        if self.given != (state.numel() == 0):
            kinds = ("drawn from a seed", "given")
            raise ValueError(
                f"{type(self).__name__}: expected a state whose {self._name} was "
                f"{kinds[self.given]}, got one that was {kinds[not self.given]}"
            )
        if not self.given:
            self.seed, self.stream = state.tolist()
            self.reset_parameters()

    def _origin(self) -> str:
        if self.given:
            return f"{self._name}=given"
        return f"seed={self.seed}" + (f", stream={self.stream}" if self.stream else "")


class FlyHash(_Fixed):
    r"""A wide, sparse, binary, fixed projection, centred and rectified.

    .. math:: h = \mathrm{relu}(m - \overline{m}), \qquad m = S x

    Each row of S has ``fan_in`` ones, at random; they are kept as an index.

    Args:
        in_features: I.
        out_features: H, the units.
        fan_in: n, the inputs of each unit, all different.
        device: Where the index lies.
        seed: What the index is drawn from, the same on every machine and device.
        stream: Tells layers of one seed apart.
        index: The inputs of each unit instead, [H, n], int32 or int64.

    Shapes: ``index`` [H, n], input [B, I], output [B, H].

    Source: the first layer of FlyNet, Hong and Pavlic, after Dasgupta, Stevens and Navlakha (2017).
    """

    _name = "index"
    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int = 7,
        device: torch.device | str | None = None,
        *,
        seed: int = 0,
        stream: int = 0,
        index: Tensor | None = None,
    ) -> None:
        if index is not None:
            out_features, fan_in = _given_index(index, in_features, out_features)
        elif not 0 <= fan_in <= in_features:
            raise ValueError(
                f"FlyHash: expected 0 <= fan_in <= in_features = {in_features}, got {fan_in}"
            )
        super().__init__()
        self.in_features, self.out_features, self.fan_in = in_features, out_features, fan_in
        self._fix(index, seed, stream, device, None)

    def _drawn(self) -> Tensor:
        return _philox.subsets(
            self.seed, self.stream, self.out_features, self.in_features, self.fan_in
        )

    def forward(self, input: Tensor) -> Tensor:
        """H of x, [B, I] to [B, H]; see :func:`neuromod_ext.functional.fly_hash`."""
        self.check_features("FlyHash", input)
        return functional.fly_hash(input, self.index)

    def check_features(self, name: str, input: Tensor) -> None:
        """Refuse an input that is not [B, I]: the index alone would take any that is long enough.

        Raises:
            ValueError: It is not.
        """
        if isinstance(input, Tensor) and (input.dim() != 2 or input.shape[1] != self.in_features):
            raise ValueError(
                f"{name}: expected input of shape [B, I] = [B, {self.in_features}], "
                f"got {list(input.shape)}"
            )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"fan_in={self.fan_in}, {self._origin()}"
        )


def _given_index(index: Tensor, in_features: int, out_features: int) -> tuple[int, int]:
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"FlyHash: expected index of dtype int32 or int64, got {index.dtype}")
    if index.dim() != 2 or index.shape[0] != out_features:
        raise ValueError(
            f"FlyHash: expected index of shape [H, n] = [{out_features}, ...], "
            f"got {list(index.shape)}"
        )
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < in_features):
        raise ValueError(f"FlyHash: expected index with entries in [0, I) = [0, {in_features})")
    return int(index.shape[0]), int(index.shape[1])


class _FixedWeight(_Fixed):
    """A layer whose weight is drawn as torch.nn draws it."""

    _name = "weight"
    weight: Tensor
    _shape: tuple[int, ...]

    def _fix_weight(
        self,
        shape: tuple[int, ...],
        weight: Tensor | None,
        seed: int,
        stream: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if weight is not None and tuple(weight.shape) != shape:
            raise ValueError(
                f"{type(self).__name__}: expected weight of shape {list(shape)}, "
                f"got {list(weight.shape)}"
            )
        self._shape = shape
        if weight is None and dtype is None:
            dtype = torch.get_default_dtype()
        self._fix(weight, seed, stream, device, dtype)

    def _drawn(self) -> Tensor:
        fan_in = math.prod(self._shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        return _philox.uniform(self.seed, self.stream, self._shape, bound)


class RandomLinear(_FixedWeight):
    r"""A linear map with a fixed random weight, modulated by a gain of its inputs.

    .. math:: y_b = W (v_{t(b)} \odot x_b)

    The weight is uniform in ±1/√I, as ``torch.nn.Linear`` draws it.

    Args:
        in_features: I.
        out_features: O.
        device: As in torch.nn.
        dtype: As in torch.nn.
        seed: What the weight is drawn from, the same bits on every machine and device.
        stream: Tells layers of one seed apart.
        weight: The weight instead, [O, I].

    Shapes: ``weight`` [O, I], input [B, ..., I], output [B, ..., O].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        seed: int = 0,
        stream: int = 0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._fix_weight((out_features, in_features), weight, seed, stream, device, dtype)

    def forward(
        self, input: Tensor, gain: Tensor | None = None, task: Tensor | None = None
    ) -> Tensor:
        """Apply the layer; ``gain`` and ``task`` as in :func:`functional.gain_linear`."""
        if gain is None:
            return F.linear(input, self.weight)
        return functional.gain_linear(input, gain, self.weight, None, task)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._origin()}"


class RandomConv2d(_FixedWeight):
    r"""A convolution with a fixed random kernel, modulated by a gain of its input channels.

    .. math:: y_b = W * (v_{t(b)} \odot x_b)

    The kernel is uniform in ±1/√fan_in, as ``torch.nn.Conv2d`` draws it.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: As in torch.nn.Conv2d, and likewise all up to ``dtype``.
        stride: Step of the kernel.
        padding: Zeros around the input, or 'same', or 'valid'.
        dilation: Spacing of the kernel.
        groups: Groups of channels.
        device: As in torch.nn.
        dtype: As in torch.nn.
        seed: What the kernel is drawn from, the same bits on every machine and device.
        stream: Tells layers of one seed apart.
        weight: The kernel instead, [O, C / groups, kH, kW].

    Shapes: ``weight`` [O, C / groups, kH, kW], input [B, C, H, W], output [B, O, H', W'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        seed: int = 0,
        stream: int = 0,
        weight: Tensor | None = None,
    ) -> None:
        plain = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, device="meta"
        )
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = plain.kernel_size, plain.stride, plain.padding
        self.dilation, self.groups = plain.dilation, groups
        self._fix_weight(tuple(plain.weight.shape), weight, seed, stream, device, dtype)

    def forward(
        self, input: Tensor, gain: Tensor | None = None, task: Tensor | None = None
    ) -> Tensor:
        """Apply the layer to [B, C, H, W]; ``gain`` [C], or [T, C] with the tasks [B]."""
        if gain is not None:
            if task is not None:
                gain = gain.index_select(0, task)
            input = input * gain.unsqueeze(-1).unsqueeze(-1)
        return F.conv2d(
            input, self.weight, None, self.stride, self.padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, {self._origin()}"
        )
