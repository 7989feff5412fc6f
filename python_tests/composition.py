"""A public function or module as a function of tensors, beside its definition in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass

from sampling import Draw
from torch import Tensor


@dataclass(frozen=True)
class Composition:
    """A differentiable call.

    Attributes:
        subject: The public name.
        label: Tells it from others of the same subject.
        call: The library's, of tensors.
        definition: The same in plain torch.
        make: Its arguments for a batch size.
        batched: Which arguments lead with the batch; if ``sums``, the result sums over it.
        sums: Whether the result has no batch dimension.
    """

    subject: str
    label: str
    call: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    make: Callable[[Draw, int], tuple[Tensor, ...]]
    batched: tuple[bool, ...]
    sums: bool = False

    @property
    def id(self) -> str:
        return f"{self.subject}-{self.label}"
