"""Figures of modulated networks; needs matplotlib, ``pip install neuromod_ext[papers]``."""

from neuromod_ext.plotting.continual import plot_images, plot_learning
from neuromod_ext.plotting.figures import plot_accuracy, plot_manifold_path, principal_components
from neuromod_ext.plotting.similarity import (
    plot_similarity,
    plot_similarity_histogram,
    plot_similarity_tree,
)

__all__ = [
    "plot_accuracy",
    "plot_images",
    "plot_learning",
    "plot_manifold_path",
    "plot_similarity",
    "plot_similarity_histogram",
    "plot_similarity_tree",
    "principal_components",
]
