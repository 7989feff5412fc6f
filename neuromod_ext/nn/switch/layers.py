"""Which of torch's layers have a tied counterpart, and which treat samples one by one."""

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


# By exact class, too: what they make of a sample does not depend on the others in the batch.
_ALWAYS: set[type[nn.Module]] = {
    nn.Sequential, nn.Identity, TiedLinear, TiedConv1d, TiedConv2d, TiedConv3d,
    nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
}  # fmt: skip
_EVALUATED: set[type[nn.Module]] = {
    nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
}  # fmt: skip


def separable(model: nn.Module) -> bool:
    """Whether a model surely treats the samples of a batch one by one, and nobody looks on."""
    return type(model) in _ALWAYS and all(map(_one_by_one, model.modules()))


def _one_by_one(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    if module._backward_pre_hooks or getattr(module, "return_indices", False):
        return False
    kind = type(module)
    if kind in _EVALUATED:  # without running statistics, a batch's are taken in evaluation, too
        return not module.training and getattr(module, "running_mean", kind) is not None
    return kind in _ALWAYS or (type(module) is nn.Flatten and module.start_dim == 1)


def retyped(model: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """The model with the classes of its layers exchanged; their attributes stay."""
    for module in model.modules():
        if type(module) in table:
            module.__class__ = table[type(module)]
    return model
