"""From ordinary models to manifold models, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from neuromod_ext.condition import Conditioned
from neuromod_ext.nn._fast_path import leave_fast_path, regain_fast_path
from neuromod_ext.nn._layer import Condition, ManifoldLayer
from neuromod_ext.nn.conv import ManifoldConv1d, ManifoldConv2d, ManifoldConv3d
from neuromod_ext.nn.linear import ManifoldLinear
from neuromod_ext.topology import Topology

# By exact class: a subclass may use its weight in ways of its own.
CONVERTIBLE: dict[type[nn.Module], Any] = {
    nn.Linear: ManifoldLinear,
    nn.Conv1d: ManifoldConv1d,
    nn.Conv2d: ManifoldConv2d,
    nn.Conv3d: ManifoldConv3d,
}


def convert(
    model: nn.Module,
    topology: Topology,
    *,
    init: Literal["scratch", "pretrained"] = "scratch",
    include: Callable[[str, nn.Module], bool] = lambda name, module: True,
) -> Conditioned:
    """A copy of a model whose linear and convolutional layers are manifold layers.

    Layers of exactly the classes ``torch.nn.Linear``, ``Conv1d``, ``Conv2d`` and ``Conv3d`` are
    replaced; all others (normalisation, attention's own projections) stay as they are.

    Args:
        model: An ordinary model, or one that was converted in part; it is not changed.
        topology: The topology of every new layer.
        init: 'scratch' draws basis points anew, as torch.nn would, whatever the model's weights;
            'pretrained' sets them so that every condition begins with the model's own weights,
            trained or not. Parameters that are frozen stay so.
        include: Called with each candidate's name and module; False leaves that layer ordinary.

    Returns:
        The model behind :class:`neuromod_ext.Conditioned`: call it as ``converted(x, s)``.

    Raises:
        TypeError: ``topology`` is none.
        ValueError: Another ``init``; nothing to convert; a parameter tied to another layer; a
            weight that is pruned or normalised; 'pretrained' with a topology that has no constant
            function in its span.
    """
    if init not in ("scratch", "pretrained"):
        raise ValueError(f"convert: expected init 'scratch' or 'pretrained', got {init!r}")
    if not isinstance(topology, Topology):
        raise TypeError(
            f"convert: expected topology to be a Topology, got {type(topology).__name__}"
        )
    if isinstance(model, Conditioned):  # of another topology
        model = model.module
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in CONVERTIBLE and include(name, module)
    ]
    if not names:
        raise ValueError("convert: expected a model with a layer to convert, got none")
    _refuse_made(model, names)
    model = copy.deepcopy(model)
    chosen = {name: model.get_submodule(name) for name in names}
    _refuse_tied(model, chosen)

    def replacement(module: nn.Module) -> ManifoldLayer:
        layer: ManifoldLayer = CONVERTIBLE[type(module)]._like(module, topology)
        if init == "pretrained":
            layer._embed(module)
        return layer

    for module in chosen.values():
        _become(module, _watched_as(module, replacement(module)))
    leave_fast_path(model)
    return Conditioned(model)


def fold(model: nn.Module, s: Condition | None = None, *, coeff: Tensor | None = None) -> nn.Module:
    """A copy of a manifold model at one condition: an ordinary model, to export and deploy.

    Args:
        model: A model with manifold layers, or one such layer; it is not changed.
        s: One condition.
        coeff: Its coefficients instead, [K].

    Returns:
        The same model with ordinary layers, without :class:`neuromod_ext.Conditioned` around it.

    Raises:
        ValueError: No manifold layer, or not exactly one condition.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, Conditioned):
            _become(module, module.module)
    layers = [module for module in model.modules() if isinstance(module, ManifoldLayer)]
    if not layers:
        raise ValueError("fold: expected a model with a manifold layer, got none")
    for layer in layers:
        _become(layer, _watched_as(layer, layer.fold(s, coeff=coeff)))
    regain_fast_path(model)
    return model


def _become(old: nn.Module, new: nn.Module) -> None:
    """Make a module another one, wherever it is held: by parents, in lists, by what wraps it."""
    vars(old).clear()
    vars(old).update(vars(new))
    old.__class__ = type(new)


_HOOKS = {name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name}


def _watched_as(old: nn.Module, new: nn.Module) -> nn.Module:
    """The new layer under the hooks of the old one, but for those that make its weights."""
    made = any(old._parameters.get(name) is None for name, _ in new.named_parameters(recurse=False))
    for name in _HOOKS:
        if not (made and name.startswith("_forward_pre")):
            vars(new)[name] = vars(old)[name]
    return new


def _refuse_made(model: nn.Module, names: list[str]) -> None:
    """What pruning and weight_norm make of parameters is no parameter, and cannot be copied."""
    for name in names:
        if model.get_submodule(name)._parameters.get("weight") is None:
            raise ValueError(
                f"convert: expected a weight that is a parameter in {name!r}, got one that is made "
                "of others (pruned or normalised); leave it out with include"
            )


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """A weight that two modules share would silently become two."""
    owners: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other_name, other = owners.setdefault(parameter, (name, module))
            if other is not module and (module in chosen.values() or other in chosen.values()):
                raise ValueError(
                    f"convert: expected parameters of their own, got one tied between "
                    f"{other_name!r} and {name!r}; leave both out with include"
                )
