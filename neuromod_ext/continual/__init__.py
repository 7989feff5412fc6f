"""Learning tasks one after another: streams of tasks, the protocol and its measures.

AugmentMNIST needs kornia, ``pip install neuromod_ext[augment]``.
"""

from neuromod_ext.continual.metrics import (
    accuracy_matrix,
    average_accuracy,
    forgetting,
    parameters_per_task,
)
from neuromod_ext.continual.protocol import accuracy, fit, learn_stream
from neuromod_ext.continual.streams import (
    AugmentMNIST,
    PermutedMNIST,
    RotationMNIST,
    ShiftMNIST,
    SplitMNIST,
    Task,
    TaskStream,
)
from neuromod_ext.continual.transforms import augmentations, rotate

__all__ = [
    "AugmentMNIST",
    "PermutedMNIST",
    "RotationMNIST",
    "ShiftMNIST",
    "SplitMNIST",
    "Task",
    "TaskStream",
    "accuracy",
    "accuracy_matrix",
    "augmentations",
    "average_accuracy",
    "fit",
    "forgetting",
    "learn_stream",
    "parameters_per_task",
    "rotate",
]
