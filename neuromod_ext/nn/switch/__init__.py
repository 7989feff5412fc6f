"""The fixed affine switch: modulators, and models they switch between functions."""

from neuromod_ext._hadamard_reference import hadamard_transform
from neuromod_ext.nn.switch.dense import Dense, Orthogonal
from neuromod_ext.nn.switch.hadamard import Hadamard
from neuromod_ext.nn.switch.kronecker import Kronecker
from neuromod_ext.nn.switch.layout import Layout, layout
from neuromod_ext.nn.switch.library import RotatedShift, orthogonal_library
from neuromod_ext.nn.switch.modulator import Composition, Modulator, condition_limit
from neuromod_ext.nn.switch.structured import BlockDiagonal, Diagonal, LowRank, ScaledPermutation
from neuromod_ext.nn.switch.switchable import Switchable
from neuromod_ext.nn.switch.training import co_optimise

__all__ = [
    "BlockDiagonal",
    "Composition",
    "Dense",
    "Diagonal",
    "Hadamard",
    "Kronecker",
    "Layout",
    "LowRank",
    "Modulator",
    "Orthogonal",
    "RotatedShift",
    "ScaledPermutation",
    "Switchable",
    "co_optimise",
    "condition_limit",
    "hadamard_transform",
    "layout",
    "orthogonal_library",
]
