"""From ordinary models to manifold models, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from neuromod_ext.condition import Conditioned
from neuromod_ext.nn._layer import Condition, ManifoldLayer
from neuromod_ext.nn.conv import ManifoldConv1d, ManifoldConv2d, ManifoldConv3d
from neuromod_ext.nn.linear import ManifoldLinear
from neuromod_ext.topology import Topology

# By exact class: a subclass may use its weight in ways of its own.
CONVERTIBLE: dict[type[nn.Module], Callable[[nn.Module, Topology], ManifoldLayer]] = {
    nn.Linear: ManifoldLinear.from_linear,  # type: ignore[dict-item]
    nn.Conv1d: ManifoldConv1d.from_conv,  # type: ignore[dict-item]
    nn.Conv2d: ManifoldConv2d.from_conv,  # type: ignore[dict-item]
    nn.Conv3d: ManifoldConv3d.from_conv,  # type: ignore[dict-item]
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
        model: An ordinary model; it is not changed.
        topology: The topology of every new layer.
        init: 'scratch' draws basis points anew, as torch.nn would, whatever the model's weights;
            'pretrained' sets them so that every condition begins with the model's own weights,
            trained or not.
        include: Called with each candidate's name and module; False leaves that layer ordinary.

    Returns:
        The model behind :class:`neuromod_ext.Conditioned`: call it as ``converted(x, s)``.

    Raises:
        ValueError: Nothing to convert; a parameter tied to another layer; 'pretrained' with a
            topology that has no constant function in its span.
    """
    if init not in ("scratch", "pretrained"):
        raise ValueError(f"convert: expected init 'scratch' or 'pretrained', got {init!r}")
    if not isinstance(topology, Topology):
        raise TypeError(
            f"convert: expected topology to be a Topology, got {type(topology).__name__}"
        )
    model = copy.deepcopy(model)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if type(module) in CONVERTIBLE and include(name, module)
    }
    if not chosen:
        raise ValueError("convert: expected a model with a layer to convert, got none")
    _refuse_tied(model, chosen)

    def replacement(module: nn.Module) -> ManifoldLayer:
        layer = CONVERTIBLE[type(module)](module, topology)
        if init == "scratch":
            layer.reset_parameters()
        return layer

    return Conditioned(_replaced(model, {m: replacement(m) for m in chosen.values()}))


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
    if isinstance(model, Conditioned):
        model = model.module
    layers = [module for module in model.modules() if isinstance(module, ManifoldLayer)]
    if not layers:
        raise ValueError("fold: expected a model with a manifold layer, got none")
    return _replaced(model, {layer: layer.fold(s, coeff=coeff) for layer in layers})


def _replaced(model: nn.Module, by: dict[nn.Module, nn.Module]) -> nn.Module:
    """The model with modules replaced, wherever and however often they stand."""
    if model in by:
        return by[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in by:
                parent._modules[name] = by[child]
    return model


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
