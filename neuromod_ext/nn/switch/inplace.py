"""How a switch in place maps parameters, there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from neuromod_ext.nn.switch.layout import Layout, Slot
from neuromod_ext.nn.switch.modulator import Modulator
from neuromod_ext.nn.switch.structured import BlockDiagonal


@dataclass
class Part:
    """Some parameters, and how a state maps them; values may be overwritten.

    Attributes:
        slots: Their places.
        there: From state 0.
        back: To state 0.
        back_moved: What a difference of switched values is in state 0.
    """

    slots: Sequence[Slot]
    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    back_moved: Callable[[Tensor], Tensor]


def parts(at: Layout, modulator: Modulator, shift: Tensor) -> list[Part]:
    """The maps of a state: of all weights, or of each layer's; and of the biases."""
    found = [_weights(at.weights, modulator)]
    blocks = layer_blocks(at, modulator)
    if blocks is not None:
        pairs = zip(at.weights, blocks, strict=True)
        found = [_weights([slot], block) for slot, block in pairs]
    if at.biases:
        found.append(Part(at.biases, lambda b: b + shift, lambda b: b - shift, lambda b: b))
    return found


def layer_blocks(at: Layout, modulator: Modulator) -> Sequence[Modulator] | None:
    """The modulator of each weight, if there is one for each."""
    sizes = [slot.shape.numel() for slot in at.weights]
    if isinstance(modulator, BlockDiagonal) and modulator.sizes == sizes:
        return modulator.blocks
    return None


def _weights(slots: Sequence[Slot], modulator: Modulator) -> Part:
    back = partial(modulator.overwrite, inverse=True)
    return Part(slots, modulator.overwrite, back, back)
