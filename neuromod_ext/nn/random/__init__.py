"""Fixed random weights, shared by all tasks, and what modulates them for each task."""

from neuromod_ext.nn.random.layers import FlyHash, RandomConv2d, RandomLinear
from neuromod_ext.nn.random.modulation import ContextModulation
from neuromod_ext.nn.random.nets import FlyNet, NeuroModNet

__all__ = [
    "ContextModulation",
    "FlyHash",
    "FlyNet",
    "NeuroModNet",
    "RandomConv2d",
    "RandomLinear",
]
