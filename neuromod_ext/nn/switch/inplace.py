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
    """Some parameters, and how a state maps them.

    Attributes:
        slots: Their places.
        overwrite: Maps the parameters where they lie, from state 0, or back if that is asked for.
        back_moved: What a difference of switched values is in state 0.
    """

    slots: Sequence[Slot]
    overwrite: Callable[[Sequence[Tensor], bool], None]
    back_moved: Callable[[Tensor], Tensor]


def parts(at: Layout, modulator: Modulator, shift: Tensor) -> list[Part]:
    """The maps of a state: of the weights, and of the biases."""
    found = [Part(at.weights, modulator.overwrite, modulator.inverse)]
    if at.biases:
        found.append(Part(at.biases, partial(_shift, shift), lambda b: b))
    return found


def layer_blocks(at: Layout, modulator: Modulator) -> Sequence[Modulator] | None:
    """The modulator of each weight, if there is one for each."""
    sizes = [slot.shape.numel() for slot in at.weights]
    if isinstance(modulator, BlockDiagonal) and modulator.sizes == sizes:
        return modulator.blocks
    return None


def _shift(shift: Tensor, biases: Sequence[Tensor], back: bool) -> None:
    parts = shift.split([b.numel() for b in biases])
    for bias, part in zip(biases, parts, strict=True):
        bias.sub_(part.view(bias.shape)) if back else bias.add_(part.view(bias.shape))
