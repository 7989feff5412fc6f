"""Layers whose weights are chosen, sample by sample, by a context."""

__version__ = "0.1.0"

from neuromod_ext import functional, nn, optim
from neuromod_ext.condition import Conditioned
from neuromod_ext.nn.conversion import convert, fold
from neuromod_ext.topology import (
    Bezier,
    Custom,
    Cylinder,
    Discrete,
    Ellipse,
    Fourier,
    Line,
    PiecewiseLinear,
    Product,
    Simplex,
    Sphere,
    Spline,
    Topology,
    Torus,
)

__all__ = [
    "Bezier",
    "Conditioned",
    "Custom",
    "Cylinder",
    "Discrete",
    "Ellipse",
    "Fourier",
    "Line",
    "PiecewiseLinear",
    "Product",
    "Simplex",
    "Sphere",
    "Spline",
    "Topology",
    "Torus",
    "convert",
    "fold",
    "functional",
    "nn",
    "optim",
]
