"""Optimizers that move whole manifolds."""

from neuromod_ext.optim.metric import EmpiricalMetric
from neuromod_ext.optim.sgd import ManifoldSGD

__all__ = ["EmpiricalMetric", "ManifoldSGD"]
