"""Modulators that hold a whole matrix, as the paper's does: for small networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuromod_ext._seeded import Seeded
from neuromod_ext.nn.switch.modulator import Modulator


def square(modulator: Modulator, name: str, matrix: Tensor) -> Tensor:
    """The matrix in float64, or a refusal."""
    matrix = modulator._finite(name, matrix, 2)
    if matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(
            f"{type(modulator).__name__}: expected {name} to be square, "
            f"got shape {list(matrix.shape)}"
        )
    return matrix


class Dense(Modulator):
    r"""Any invertible matrix: n² numbers.

    .. math:: w' = M w

    Args:
        matrix: M, [n, n].
        seed: Where it comes from, for the record.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not square, not finite, or of a condition number above
            ``condition_limit(torch.float64)``.
    """

    matrix: Tensor
    inverse_matrix: Tensor

    def __init__(self, matrix: Tensor, seed: int | None = None) -> None:
        super().__init__(max(1, len(matrix) if isinstance(matrix, Tensor) and matrix.dim() else 1))
        matrix = square(self, "matrix", matrix)
        self.seed = seed
        self.register_buffer("matrix", matrix)
        self.register_buffer("inverse_matrix", torch.empty_like(matrix), persistent=False)
        self._derive()

    @classmethod
    def random(cls, n: int, seed: int) -> Dense:
        """A matrix of independent normal numbers of variance 1/n (our choice)."""
        entries = torch.from_numpy(Seeded(seed).normal(n * n)).view(n, n)
        return cls(entries / math.sqrt(n), seed)

    def _derive(self) -> None:
        values = torch.linalg.svdvals(self.matrix)
        self._range = float(values[-1]), float(values[0])
        self.check(torch.float64)
        self.inverse_matrix = torch.linalg.inv(self.matrix)

    def _map(self, w: Tensor) -> Tensor:
        return w @ self.matrix.T

    def _inverse(self, w: Tensor) -> Tensor:
        return w @ self.inverse_matrix.T

    def _transpose(self, w: Tensor) -> Tensor:
        return w @ self.matrix

    def singular_range(self) -> tuple[float, float]:
        """The extreme singular values."""
        return self._range

    def _roundings(self) -> float:
        # A dot product of n terms, n roundings of |M| |w|, of norm ≤ √n ‖M‖ ‖w‖; the inverse's
        # own error is some n κ of them more.
        return float(self.size**1.5) * (1 + self.condition_number())


class Orthogonal(Modulator):
    r"""A rotation or reflection: lengths and angles stay, and M⁻¹ = Mᵀ exactly.

    Args:
        matrix: M, [n, n].
        seed: Where it comes from, for the record.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not square, not finite, or Mᵀ M misses 1 by more than n 2⁻⁴⁸ somewhere.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, seed: int | None = None) -> None:
        super().__init__(max(1, len(matrix) if isinstance(matrix, Tensor) and matrix.dim() else 1))
        self.seed = seed
        self.register_buffer("matrix", square(self, "matrix", matrix))
        self._derive()

    @classmethod
    def random(cls, n: int, seed: int) -> Orthogonal:
        """A matrix uniform among all orthogonal ones; some 5 n³ operations."""
        return cls(torch.from_numpy(Seeded(seed).orthogonal(n)), seed)

    def _derive(self) -> None:
        eye = torch.eye(self.size, dtype=torch.float64, device=self.matrix.device)
        missed = float((self.matrix.T @ self.matrix - eye).abs().max())
        if not missed <= self.size * 2.0**-48:
            raise ValueError(
                f"Orthogonal: expected matrix.T @ matrix to be 1 within {self.size * 2.0**-48:.1g},"
                f" got {missed:.2g} off; orthonormalise it in float64, or use Dense"
            )

    def _map(self, w: Tensor) -> Tensor:
        return w @ self.matrix.T

    def _inverse(self, w: Tensor) -> Tensor:
        return w @ self.matrix

    _transpose = _inverse

    def singular_range(self) -> tuple[float, float]:
        """Both are 1."""
        return 1.0, 1.0

    def _roundings(self) -> float:
        return 2 * float(self.size**1.5)  # as Dense; and as far as Mᵀ M misses 1
