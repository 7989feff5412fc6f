"""Keeping torch's fused transformer encoder from layers whose weight depends on the call.

In evaluation without gradients, ``torch.nn.TransformerEncoderLayer`` reads the weights of its
linear layers and does not call them; it calls them where anything in it has a hook.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def _present(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing but be there."""


def leave_fast_path(model: nn.Module) -> None:
    """Have the encoder layers of a model call their linear layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_present)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only the fused layer takes those


def regain_fast_path(model: nn.Module) -> None:
    """Undo that, but for padding: torch decides on it when it builds an encoder."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _present]:
            del hooks[key]
