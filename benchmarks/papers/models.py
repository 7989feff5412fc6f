"""The networks of the experiments; each is called with images and their conditions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import neuromod_ext as nm


def cnn(channels: int, width: int) -> nn.Sequential:
    """A CNN for images of any size, with He's initial weights."""
    net = nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(2 * width * 9, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, 10),
    )
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


class Unconditioned(nn.Module):
    """The CNN, which is not told the condition."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.module = cnn(channels, width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Classify x, [B, C, H, W]."""
        return self.module(x)


class Concatenated(nn.Module):
    """The CNN with a phase's cosine and sine as two more, constant input channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.module = cnn(channels + 2, width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Classify x, [B, C, H, W], at turns, [B] or []."""
        phase = 2 * math.pi * turns
        point = torch.stack((phase.cos(), phase.sin()), -1)[..., None, None]
        return self.module(torch.cat((x, point.expand(len(x), 2, *x.shape[2:])), 1))


def ring(channels: int, width: int) -> nm.Conditioned:
    """The CNN with each weight on an ellipse; it begins as the CNN itself at every phase."""
    return nm.convert(cnn(channels, width), nm.Ellipse(), init="pretrained")


def concatenated_wide(channels: int, width: int) -> Concatenated:
    """``Concatenated``, as wide as has the ring's number of parameters, within a few percent."""
    target = size(ring(channels, width))
    wider = (Concatenated(channels, w) for w in range(width, 2 * width + 1))
    return min(wider, key=lambda model: abs(size(model) - target))


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
