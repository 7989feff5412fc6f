"""Random operands: sizes, layouts, values. Every draw is a function of its seed, a string.

A layout places a tensor's elements in a larger allocation whose other elements are NaN (a large
number beside integers), so a kernel that reads beside its operand shows it, and one that writes
there is caught by :func:`snapshot`.
"""

import math
import random
import zlib

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
SIZES = (0, 1, 1, 2, 2, 3, 3, 5, 5, 7, 7, 13, 13, 31, 67)
GUARD = 16  # elements before and after every tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coefficients and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def placed(values: Tensor, layout: str) -> Tensor:
    """A view with the strides of ``layout``, of ``values`` (expanded: of their first slices).

    A plain one is a whole allocation of its own.
    """
    if layout == "plain":
        return values
    shape = list(values.shape)
    if layout == "expanded" and shape:
        first = values.narrow(0, 0, min(1, shape[0]))
        return placed(first, "contiguous").expand(shape)
    if layout == "transposed":
        shape.reverse()
    step = 2 if layout == "strided" else 1
    start = GUARD + (1 if layout == "offset" else 0)
    stop = start + math.prod(shape) * step
    guard = math.nan
    if not values.is_floating_point():
        most = torch.iinfo(values.dtype).max
        guard = most // 2 + min(12345, most // 4)
    base = torch.full((stop + GUARD,), guard, dtype=values.dtype, device=values.device)
    view = base[start:stop:step].view(shape)
    if layout == "transposed":
        view = view.permute(*range(len(shape) - 1, -1, -1))
    view.copy_(values)
    return view


def snapshot(t: Tensor) -> Tensor:
    """The bytes of the whole allocation behind a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()


class Draw:
    """A source of sizes and tensors.

    Args:
        seed: Says which; printed by a failing case, and enough to draw it again.
        dtype: Of the tensors, unless they ask for another.
        device: Where they lie.
        layouts: What layouts they may get.
    """

    def __init__(
        self,
        seed: str,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        layouts: tuple[str, ...] = ("plain",),
    ) -> None:
        self.seed, self.dtype, self.device, self.layouts = seed, dtype, device, layouts
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def __repr__(self) -> str:
        device = f", {self.device!r}" if self.device != "cpu" else ""
        return f"Draw({self.seed!r}, {self.dtype}{device}, layouts={self.layouts})"

    def pick(self, *options):
        return self.random.choice(options)

    def sizes(self, count: int, most: int) -> list[int]:
        """As many sizes, 0, 1 and primes, whose product is at most ``most``."""
        while True:
            sizes = [self.pick(*SIZES) for _ in range(count)]
            if math.prod(max(size, 1) for size in sizes) <= most:
                return sizes

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(
            self.device, dtype or self.dtype
        )

    def tensor(
        self, *shape: int, dtype: torch.dtype | None = None, in_place: bool = False
    ) -> Tensor:
        """Standard normal numbers in some layout; ``in_place`` ones overlap nowhere."""
        layouts = [name for name in self.layouts if not (in_place and name == "expanded")]
        return placed(self.values(*shape, dtype=dtype), self.pick(*layouts))

    def coeff(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The same in the dtype of coefficients."""
        return self.tensor(*shape, dtype=wide(dtype or self.dtype))

    def index(self, *shape: int, modulus: int) -> Tensor:
        """Integers that count modulo ``modulus``: most of them near 0, of either sign."""
        far = (-(2**63), 2**63 - 1, -modulus, 2 * modulus)
        near = range(-modulus, 2 * modulus)
        count = math.prod(shape)
        values = [
            self.pick(*far) if self.random.random() < 0.1 else self.pick(*near)
            for _ in range(count)
        ]
        whole = torch.tensor(values, dtype=torch.int64, device=self.device).view(shape)
        return placed(whole, self.pick(*self.layouts))
