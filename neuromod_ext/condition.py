"""How a condition reaches layers that are nested in an ordinary model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neuromod_ext._ambient import claim, restored
from neuromod_ext.nn._layer import Condition, ManifoldLayer
from neuromod_ext.topology import Topology


class Conditioned(nn.Module):
    """A model whose manifold layers all get the condition of the call.

    ``Conditioned(model)(x, s)`` computes each topology's coefficients once, sets them on the
    manifold layers for the time of the call, and calls ``model(x)``. It works under
    ``torch.compile(fullgraph=True)``, export and data parallelism.

    The coefficients are gone when the call returns, so what runs a layer later must bring them
    back: pass ``context_fn=conditioned.checkpoint_contexts`` to ``torch.utils.checkpoint``; without
    it, the recomputation raises. A second call on the same layers before the first has returned
    (from another thread, say) raises too.

    Args:
        module: The model; its manifold layers may have different topologies, whose conditions
            have the same shape. Arguments of its own by the names ``s`` and ``coeff`` can only be
            given by position.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        input: Any,
        s: Condition | None = None,
        *args: Any,
        coeff: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model under a condition.

        Args:
            input: The model's first argument.
            s: The conditions, one a sample, or one for all.
            *args: The model's further arguments.
            coeff: The conditions' coefficients instead, [B, K] or [K].
            **kwargs: The model's keyword arguments.

        Returns:
            What the model returns.

        Raises:
            ValueError: Not exactly one of ``s`` and ``coeff``; a condition out of its domain; no
                manifold layer.
            RuntimeError: The layers are in use by another call.
        """
        if (s is None) == (coeff is None):
            got = "neither" if s is None else "both"
            raise ValueError(f"Conditioned: expected either s or coeff, got {got}")
        layers = self._layers()
        if not layers:
            raise ValueError("Conditioned: expected a model with a manifold layer, got none")
        coeffs: dict[tuple[Topology, torch.dtype], Tensor] = {}
        for layer in layers:
            key = layer.topology, layer.weight.dtype
            if key not in coeffs:
                coeffs[key] = layer.coefficients(s, coeff)
        values = [(layer, coeffs[layer.topology, layer.weight.dtype]) for layer in layers]
        if not claim("ambient_coeff", values):
            raise RuntimeError(
                "Conditioned: expected layers that no other call is using, got layers whose "
                "condition is set; give each thread a copy of the model"
            )
        try:
            return self.module(input, *args, **kwargs)
        finally:
            for layer in layers:
                layer.ambient_coeff = None

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For ``torch.utils.checkpoint(..., use_reentrant=False, context_fn=...)``.

        Returns:
            A context for the first run, which changes nothing, and one for the recomputation, in
            which the layers have the coefficients they have now.
        """
        now = [(layer, layer.ambient_coeff) for layer in self._layers()]
        return nullcontext(), restored("ambient_coeff", now)

    def _layers(self) -> list[ManifoldLayer]:
        return [module for module in self.module.modules() if isinstance(module, ManifoldLayer)]
