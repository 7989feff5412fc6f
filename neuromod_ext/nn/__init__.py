"""Manifold layers, conversion to and from them, the affine switch, fixed random layers."""

from neuromod_ext.nn import switch as switch
from neuromod_ext.nn._layer import ManifoldLayer
from neuromod_ext.nn.conv import ManifoldConv1d, ManifoldConv2d, ManifoldConv3d
from neuromod_ext.nn.linear import ManifoldLinear
from neuromod_ext.nn.random import (
    ContextModulation,
    FlyHash,
    FlyNet,
    NeuroModNet,
    RandomConv2d,
    RandomLinear,
)

__all__ = [
    "ContextModulation",
    "FlyHash",
    "FlyNet",
    "ManifoldConv1d",
    "ManifoldConv2d",
    "ManifoldConv3d",
    "ManifoldLayer",
    "ManifoldLinear",
    "NeuroModNet",
    "RandomConv2d",
    "RandomLinear",
]
