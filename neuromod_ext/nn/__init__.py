"""Manifold layers, conversion between ordinary models and manifold models, the affine switch."""

from neuromod_ext.nn import switch as switch
from neuromod_ext.nn._layer import ManifoldLayer
from neuromod_ext.nn.conv import ManifoldConv1d, ManifoldConv2d, ManifoldConv3d
from neuromod_ext.nn.linear import ManifoldLinear

__all__ = ["ManifoldConv1d", "ManifoldConv2d", "ManifoldConv3d", "ManifoldLayer", "ManifoldLinear"]
