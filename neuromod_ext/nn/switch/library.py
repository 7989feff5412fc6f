"""Several modulators that lead in different directions."""

from __future__ import annotations

import torch
from torch import Tensor

from neuromod_ext.nn.switch.hadamard import Hadamard
from neuromod_ext.nn.switch.modulator import Modulator


class RotatedShift(Modulator):
    r"""A cyclic shift of the weights by k places, seen in a random basis: a rotation.

    .. math:: M_k = Q^\top S^k Q, \qquad \langle M_j, M_k \rangle = \mathrm{tr}(M_j^\top M_k) = 0
        \text{ for } j \ne k \pmod n

    Q is the ``Hadamard`` rotation of the seed. M_0 is the identity, and M_j M_k = M_{j + k}.

    Args:
        n: Number of weights.
        seed: The seed of Q.
        steps: k.
    """

    _wide = False

    def __init__(self, n: int, seed: int, steps: int = 1) -> None:
        super().__init__(n, seed)
        self.rotation = Hadamard(n, seed)
        self.steps = steps % n

    def _shifted(self, w: Tensor, steps: int) -> Tensor:
        return self.rotation._inverse(torch.roll(self.rotation._map(w), steps, -1))

    def _map(self, w: Tensor) -> Tensor:
        return self._shifted(w, self.steps)

    def _inverse(self, w: Tensor) -> Tensor:
        return self._shifted(w, -self.steps)

    _transpose = _inverse

    def singular_range(self) -> tuple[float, float]:
        """Both are 1."""
        return 1.0, 1.0

    def _roundings(self) -> float:
        return 2 * self.rotation._roundings()

    def get_extra_state(self) -> Tensor:
        """The shift, and what every modulator has."""
        return torch.cat((torch.tensor([self.steps]), super().get_extra_state()))

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what a state_dict holds of that."""
        self.steps = int(state[0])
        super().set_extra_state(state[1:])

    def extra_repr(self) -> str:
        """Size, seed and shift."""
        return f"{super().extra_repr()}, steps={self.steps}"


def orthogonal_library(n: int, count: int, seed: int) -> list[RotatedShift]:
    """Mutually orthogonal modulators, orthogonal to the identity, too: none is part of another.

    Args:
        n: Number of weights.
        count: How many, below n.
        seed: The seed of all.

    Raises:
        ValueError: There are fewer than 1 or more than n - 1.
    """
    if not 1 <= count < n:
        raise ValueError(
            f"orthogonal_library: expected count from 1 to n - 1 = {n - 1}, got {count}"
        )
    return [RotatedShift(n, seed, (k * n) // (count + 1)) for k in range(1, count + 1)]
