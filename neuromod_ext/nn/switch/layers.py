"""Which of torch's layers have a tied counterpart."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from neuromod_ext.nn.switch.recurrent import TiedGRU, TiedLSTM
from neuromod_ext.nn.switch.tied import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear

# By exact class: a subclass may use its weight in ways of its own.
TIED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TiedLinear,
    nn.Conv1d: TiedConv1d,
    nn.Conv2d: TiedConv2d,
    nn.Conv3d: TiedConv3d,
    nn.GRU: TiedGRU,
    nn.LSTM: TiedLSTM,
}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {tied: plain for plain, tied in TIED.items()}


def retyped(model: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """The model with the classes of its layers exchanged; their attributes stay."""
    for module in model.modules():
        if type(module) in table:
            module.__class__ = table[type(module)]
    return model
