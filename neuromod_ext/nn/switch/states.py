"""From states and doses to the weight of each state."""

from __future__ import annotations

import torch
from torch import Tensor

from neuromod_ext.nn._layer import conditions
from neuromod_ext.topology import Discrete, Line, Simplex

State = Tensor | float


class Dose(Line):
    """The dose of one modulator, a number in [0, 1]."""

    _remedy = ""


class Doses(Simplex):
    """What is left of 1, and the doses of several modulators."""

    _remedy = "; the first is what the doses leave of 1"


def coefficients(
    state: State, states: Discrete, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The weight c of each state, and the states themselves where they are such, one a sample.

    Integers and booleans are states, floating numbers doses.

    Args:
        state: As :meth:`Switchable.forward` takes it.
        states: Those there are, K.
        dtype: Of c.
        device: Likewise.

    Returns:
        c, [B, K] or [K]; and the states, [B], or None.

    Raises:
        TypeError: A dtype of neither.
        ValueError: Out of the domain, or a wrong number of doses.
    """
    given = conditions(state, device)
    if given.dtype is torch.bool:
        given = given.long()
    if not given.is_floating_point():
        coeff = states(given)
        return coeff.to(dtype), given.long() if given.dim() == 1 else None
    num_states = states.num_basis
    if num_states == 2:
        return Dose()(given).to(dtype), None
    if given.shape[-1:] != (num_states - 1,):
        raise ValueError(
            f"Switchable: expected doses of shape [..., {num_states - 1}], one for each "
            f"modulator, got {list(given.shape)}"
        )
    rest = 1 - given.sum(-1, keepdim=True)
    return Doses(num_states)(torch.cat((rest, given), -1)).to(dtype), None
