"""Which numbers of a model are switched: all weights as one vector, all biases as another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuromod_ext.nn.switch.layers import TIED
from neuromod_ext.nn.switch.modulator import Modulator
from neuromod_ext.nn.switch.structured import BlockDiagonal

_MADE = ("_orig", "_g", "_v")  # parameters of which pruning and weight_norm make a weight


@dataclass(frozen=True)
class Slot:
    """A parameter's place in the vector of weights or of biases."""

    module: str
    name: str
    shape: torch.Size
    begin: int

    @property
    def end(self) -> int:
        """One past its last number."""
        return self.begin + self.shape.numel()

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def of(self, model: nn.Module) -> Tensor:
        """The parameter itself, or what ``torch.func.functional_call`` put in its place."""
        found: Tensor = getattr(model.get_submodule(self.module), self.name)
        return found


@dataclass(frozen=True)
class Layout:
    """The switched parameters of a model, in the order of ``model.named_modules()``.

    Attributes:
        weights: Places of the weights of its linear, convolutional and recurrent layers.
        biases: Places of their biases.
        dtype: Of all of them.
    """

    weights: tuple[Slot, ...]
    biases: tuple[Slot, ...]
    dtype: torch.dtype

    @property
    def num_weights(self) -> int:
        """Length of the vector of weights."""
        return self.weights[-1].end

    @property
    def num_biases(self) -> int:
        """Length of the vector of biases."""
        return self.biases[-1].end if self.biases else 0

    def per_layer(self, build: Callable[[str, torch.Size], Modulator]) -> BlockDiagonal:
        """A modulator for each weight, together one of all.

        Args:
            build: Called with each weight's name in the model and its shape; a convolution's
                weight [O, C, ...] is flattened as O rows of the rest.

        Raises:
            ValueError: A modulator is not as large as its weight.
        """
        blocks = []
        for slot in self.weights:
            block = build(slot.path, slot.shape)
            if block.size != slot.shape.numel():
                raise ValueError(
                    f"per_layer: expected a modulator of {slot.shape.numel()} weights for "
                    f"{slot.path!r} of shape {list(slot.shape)}, got {block.size}"
                )
            blocks.append(block)
        return BlockDiagonal(*blocks)


def layout(model: nn.Module) -> Layout:
    """Find what :class:`Switchable` switches in a model.

    That is weights and biases of layers of exactly the classes ``torch.nn.Linear``, ``Conv1d``,
    ``Conv2d``, ``Conv3d``, ``GRU`` and ``LSTM``. All other parameters (normalisation, embeddings,
    attention's own projections) stay as they are in every state.

    Raises:
        ValueError: No such layer, a parameter that two layers share, several dtypes or devices, or
            a weight that is pruned or normalised.
    """
    owners: dict[nn.Parameter, str] = {}
    tied: dict[nn.Parameter, str] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter in owners:
                tied[parameter] = module_name
            owners.setdefault(parameter, module_name)
    weights: list[Slot] = []
    biases: list[Slot] = []
    first: Tensor | None = None
    for module_name, module in model.named_modules():
        if type(module) not in TIED:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith(_MADE):
                raise ValueError(
                    f"layout: expected weights that are parameters in {module_name!r}, got "
                    f"{name!r}, of which one is made (pruned or normalised)"
                )
            if parameter in tied:
                raise ValueError(
                    "layout: expected parameters of their own, got one tied between "
                    f"{owners[parameter]!r} and {tied[parameter]!r}"
                )
            first = parameter if first is None else first
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise ValueError(
                    f"layout: expected all weights and biases in {_name(first)}, got "
                    f"{_name(parameter)} in {module_name!r}; convert one of them"
                )
            slots = biases if name.startswith("bias") else weights
            begin = slots[-1].end if slots else 0
            slots.append(Slot(module_name, name, parameter.shape, begin))
    if first is None:
        raise ValueError("layout: expected a model with a layer to switch, got none")
    return Layout(tuple(weights), tuple(biases), first.dtype)


def flattened(model: nn.Module, slots: Sequence[Slot]) -> Tensor:
    """The parameters at some places, at least one, as one vector; differentiable.

    That of one place is a view.
    """
    parts = [slot.of(model).flatten() for slot in slots]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _name(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} on {t.device}"
