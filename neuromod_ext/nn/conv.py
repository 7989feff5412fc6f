"""The manifold counterparts of ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromod_ext import functional
from neuromod_ext.nn._layer import Condition, ManifoldLayer
from neuromod_ext.topology import Topology

Size = int | tuple[int, ...]
PlainConv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Self = TypeVar("Self", bound="_ManifoldConv")


class _ManifoldConv(ManifoldLayer):
    """A convolution of any number of dimensions; torch.nn's own reads the arguments."""

    _plain_class: ClassVar[type[PlainConv]]
    _convolve: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        topology: Topology,
    ) -> None:
        super().__init__(topology)
        arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
        }
        plain = self._plain_class(**arguments, bias=bias, device="meta")
        for name in arguments:
            setattr(self, name, getattr(plain, name))
        # the names that torch's own code reads, in extra_repr for one
        self.output_padding = plain.output_padding
        self._padding_around = plain._reversed_padding_repeated_twice
        self._arguments = arguments
        self._make_parameters(tuple(plain.weight.shape), bias, device, dtype)

    @classmethod
    def from_conv(cls: type[Self], conv: PlainConv, topology: Topology) -> Self:
        """A manifold around a trained layer: every condition begins with its weight.

        Raises:
            ValueError: No constant function is in the span of the topology's coefficients.
        """
        layer = cls._like(conv, topology)
        layer._embed(conv)
        return layer

    @classmethod
    def _like(cls: type[Self], conv: PlainConv, topology: Topology) -> Self:
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            topology=topology,
        )._flagged_as(conv)

    def forward(
        self, input: Tensor, s: Condition | None = None, *, coeff: Tensor | None = None
    ) -> Tensor:
        """Apply the layer.

        Args:
            input: x, [B, C, ...].
            s: The conditions, one a sample, or one for all: see the topology for shape and unit.
            coeff: Their coefficients instead, [B, K] or [K], computed once for many layers.

        Returns:
            y, [B, O, ...].

        Raises:
            ValueError: No condition, a shape that does not fit, a condition out of its domain.
            TypeError: A dtype that does not fit.
        """
        coeff = self.coefficients(s, coeff)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._padding_around, mode=str(self.padding_mode))
            padding = 0
        convolve = type(self)._convolve
        return convolve(
            input,
            self.weight,
            coeff,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )

    def _plain(self) -> PlainConv:
        return self._plain_class(**self._arguments, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        """The arguments, as torch.nn prints them."""
        plain: Any = self
        return f"{self._plain_class.extra_repr(plain)}, topology={self.topology!r}"


class ManifoldConv1d(_ManifoldConv):
    """As :class:`ManifoldConv2d`, over one dimension."""

    _plain_class = nn.Conv1d
    _convolve = staticmethod(functional.manifold_conv1d)


class ManifoldConv2d(_ManifoldConv):
    r"""A convolution whose kernel is picked on a manifold by each sample's condition.

    .. math:: y_b = W(s_b) * x_b + \beta(s_b), \qquad W(s) = \sum_k c_k(s) P_k

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: As in torch.nn.Conv2d, and likewise all that follow.
        stride: Step of the kernel.
        padding: Zeros around the input, or 'same', or 'valid'.
        dilation: Spacing of the kernel.
        groups: Groups of channels.
        bias: Whether there is a bias, with basis points of its own.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: As in torch.nn.
        dtype: As in torch.nn.
        topology: The topology, which maps conditions to coefficients.

    Shapes: ``weight`` [K, O, C / groups, kH, kW], ``bias`` [K, O], input [B, C, H, W], output
    [B, O, H', W'].

    Source: Benjamin et al., "Walking the Weight Manifold".
    """

    _plain_class = nn.Conv2d
    _convolve = staticmethod(functional.manifold_conv2d)


class ManifoldConv3d(_ManifoldConv):
    """As :class:`ManifoldConv2d`, over three dimensions."""

    _plain_class = nn.Conv3d
    _convolve = staticmethod(functional.manifold_conv3d)
