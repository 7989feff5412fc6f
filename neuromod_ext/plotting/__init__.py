"""Figures of conditioned models; needs matplotlib, ``pip install neuromod_ext[papers]``."""

from neuromod_ext.plotting.figures import plot_accuracy, plot_manifold_path, principal_components

__all__ = ["plot_accuracy", "plot_manifold_path", "principal_components"]
