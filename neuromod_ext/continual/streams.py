"""Streams of tasks, made of one set of labelled images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuromod_ext import _checks
from neuromod_ext.continual.transforms import augmentations, rotate

if TYPE_CHECKING:
    from typing_extensions import Self


class Task(Dataset[tuple[Tensor, Tensor]]):
    """The data of one task, an ordinary map-style data set.

    ``DataLoader(task, 128, shuffle=True)`` takes it as it is. A list of places gives a whole batch
    at once, so ``DataLoader(task, sampler=BatchSampler(RandomSampler(task), 128, False),
    batch_size=None)`` gives the same without stacking single images.

    Attributes:
        name: What the task does.
        inputs: [N, C, H, W], transformed, then normalised.
        labels: [N], int64.
    """

    def __init__(self, name: str, inputs: Tensor, labels: Tensor) -> None:
        self.name = name
        self.inputs = inputs
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """One input, [C, H, W], and its label, []; of several places, each with [n] before."""
        return self.inputs[index], self.labels[index]


class TaskStream(ABC, Sequence[Task]):
    """A sequence of tasks; each is made when it is asked for, and not kept.

    Make one of the training images and one of the test images.

    Args:
        images: [N, H, W] or [N, C, H, W], floating in [0, 1], or uint8.
        labels: [N], int64.
        mean: Subtracted from the transformed images.
        std: They are divided by it afterwards.

    Attributes:
        names: Of the tasks.
        closed: Whether the last task stands next to the first.

    Raises:
        TypeError: Images that are neither floating nor uint8, or labels that are not int64.
        ValueError: Shapes that do not fit, no image, images outside of [0, 1], or a std that is not
            above 0.
    """

    names: tuple[str, ...]
    closed = False

    def __init__(
        self, images: Tensor, labels: Tensor, *, mean: float = 0.1307, std: float = 0.3081
    ) -> None:
        self.images, self.labels = _checked(type(self).__name__, images, labels)
        if not (0 < std < math.inf and math.isfinite(mean)):
            raise ValueError(
                f"{type(self).__name__}: expected a finite mean and a finite std > 0, "
                f"got {mean} and {std}"
            )
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        """Make a task, or the tasks of a slice."""
        if isinstance(index, slice):
            return [self[t] for t in range(*index.indices(len(self)))]
        task = range(len(self))[index]  # its IndexError ends an iteration
        inputs, labels = self._make(task)
        return Task(self.names[task], (inputs - self.mean) / self.std, labels)

    def take(self, count: int) -> Self:
        """The stream of the first tasks.

        Args:
            count: How many; all there are, if there are no more.

        Returns:
            A stream, open unless it has all tasks of a closed one.

        Raises:
            ValueError: ``count`` is below 1.
        """
        _at_least(f"{type(self).__name__}.take", "count", count, 1)
        taken = copy(self)
        taken.names = self.names[:count]
        taken.closed = self.closed and len(taken) == len(self)
        return taken

    @abstractmethod
    def _make(self, task: int) -> tuple[Tensor, Tensor]:
        """The transformed images of a task, and their labels."""


class RotationMNIST(TaskStream):
    """Task t shows the images rotated counterclockwise by t times ``step`` degrees.

    Args:
        images: As of every :class:`TaskStream`, square.
        labels: As of every stream.
        tasks: How many.
        step: Degrees between tasks. The stream is closed if they come round to 360.
        **normalise: ``mean`` and ``std``, as of every stream.

    Raises:
        TypeError: As of every stream.
        ValueError: As of every stream; also images that are not square, or ``tasks`` below 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        tasks: int = 36,
        step: float = 10.0,
        **normalise: float,
    ) -> None:
        super().__init__(images, labels, **normalise)
        _at_least("RotationMNIST", "tasks", tasks, 1)
        height, width = self.images.shape[2:]
        if height != width:
            raise ValueError(
                f"RotationMNIST: expected square images, got {height} x {width} pixels"
            )
        self.degrees = [step * t for t in range(tasks)]
        self.names = tuple(f"{degrees:g}°" for degrees in self.degrees)
        self.closed = math.isclose(tasks * step, 360)

    def _make(self, task: int) -> tuple[Tensor, Tensor]:
        return rotate(self.images, self.degrees[task]), self.labels


class ShiftMNIST(TaskStream):
    """Task t shows the images shifted to the right by t times ``pixels``, periodically.

    There are W / ``pixels`` tasks, in a closed order: 28 (-1px) or 14 (-2px) with MNIST.

    Args:
        images: As of every :class:`TaskStream`.
        labels: As of every stream.
        pixels: Between tasks; divides the width W of the images.
        **normalise: ``mean`` and ``std``, as of every stream.

    Raises:
        TypeError: As of every stream.
        ValueError: As of every stream; also where ``pixels`` does not divide the width.
    """

    closed = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        pixels: int = 1,
        **normalise: float,
    ) -> None:
        super().__init__(images, labels, **normalise)
        width = self.images.shape[3]
        if pixels < 1 or width % pixels:
            raise ValueError(
                f"ShiftMNIST: expected pixels to divide the width, {width}, got {pixels}"
            )
        self.shifts = list(range(0, width, pixels))
        self.names = tuple(f"{shift} px" for shift in self.shifts)

    def _make(self, task: int) -> tuple[Tensor, Tensor]:
        return self.images.roll(self.shifts[task], -1), self.labels


class AugmentMNIST(TaskStream):
    """Eight tasks: the images as they are, and under seven augmentations, from kornia.

    The original, horizontal flip, vertical flip, Gaussian blur (5 pixels, sigma 2), perspective
    (distortion 0.5), random erasing, inversion, and a random crop resized to the images' size. What
    is random is drawn once for each image, from ``seed`` and the task: a task always shows the same
    images (our choice).

    Args:
        images: As of every :class:`TaskStream`.
        labels: As of every stream.
        seed: Of the random augmentations; give test images another than training images.
        **normalise: ``mean`` and ``std``, as of every stream.

    Raises:
        ImportError: There is no kornia.
        TypeError: As of every stream.
        ValueError: As of every stream.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int = 0,
        **normalise: float,
    ) -> None:
        super().__init__(images, labels, **normalise)
        height, width = self.images.shape[2:]
        self.transforms = augmentations((height, width))
        self.names = tuple(self.transforms)
        self.seed = seed

    def _make(self, task: int) -> tuple[Tensor, Tensor]:
        on_gpu = [self.images.device] if self.images.is_cuda else []
        with torch.random.fork_rng(on_gpu), torch.no_grad():
            torch.manual_seed(_seed(self.seed, task))
            return self.transforms[self.names[task]](self.images), self.labels


class PermutedMNIST(TaskStream):
    """Task t shows the images with their pixels in an order of its own; the first, as they are.

    Args:
        images: As of every :class:`TaskStream`.
        labels: As of every stream.
        tasks: How many.
        seed: Of the orders; give test images the same as training images.
        **normalise: ``mean`` and ``std``, as of every stream.

    Raises:
        TypeError: As of every stream.
        ValueError: As of every stream; also ``tasks`` below 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        tasks: int = 10,
        seed: int = 0,
        **normalise: float,
    ) -> None:
        super().__init__(images, labels, **normalise)
        _at_least("PermutedMNIST", "tasks", tasks, 1)
        self.names = ("original", *(f"permutation {t}" for t in range(1, tasks)))
        self.seed = seed

    def _make(self, task: int) -> tuple[Tensor, Tensor]:
        pixels = self.images.flatten(2)
        if task:
            generator = torch.Generator().manual_seed(_seed(self.seed, task))
            order = torch.randperm(pixels.shape[2], generator=generator)
            pixels = pixels[:, :, order.to(pixels.device)]
        return pixels.view_as(self.images), self.labels


class SplitMNIST(TaskStream):
    """Task t has the images of its own classes only: with MNIST 0 and 1, then 2 and 3, and so on.

    Args:
        images: As of every :class:`TaskStream`.
        labels: As of every stream.
        classes: In a task; divides their number, which is the largest label and one.
        relabel: Count the classes of each task from 0.
        **normalise: ``mean`` and ``std``, as of every stream.

    Raises:
        TypeError: As of every stream.
        ValueError: As of every stream; also where ``classes`` does not divide their number, or a
            task would have no image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        classes: int = 2,
        relabel: bool = True,
        **normalise: float,
    ) -> None:
        super().__init__(images, labels, **normalise)
        present = self.labels.bincount()
        if classes < 1 or len(present) % classes:
            raise ValueError(
                f"SplitMNIST: expected classes to divide their number, {len(present)}, "
                f"got {classes}"
            )
        self.classes = [range(c, c + classes) for c in range(0, len(present), classes)]
        self.names = tuple("/".join(map(str, group)) for group in self.classes)
        for name, group in zip(self.names, self.classes, strict=True):
            if not present[group.start : group.stop].any():
                raise ValueError(f"SplitMNIST: expected images of classes {name}, got none")
        self.relabel = relabel

    def _make(self, task: int) -> tuple[Tensor, Tensor]:
        group = self.classes[task]
        chosen = (self.labels >= group.start) & (self.labels < group.stop)
        labels = self.labels[chosen]
        return self.images[chosen], labels - group.start if self.relabel else labels


def _seed(seed: int, task: int) -> int:
    """One seed for each pair, apart from those nearby."""
    return (1_000_003 * seed + task) % 2**63


def _at_least(op: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{op}: expected {name} of at least {least}, got {value}")


def _checked(op: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images as [N, C, H, W], floating in [0, 1], and the labels."""
    _checks.tensors(op, images=images, labels=labels)
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif not images.is_floating_point():
        raise TypeError(
            f"{op}: expected images of a floating dtype or uint8, got {_checks._name(images.dtype)}"
        )
    if images.dim() == 3:
        images = images.unsqueeze(1)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(
            f"{op}: expected images of shape [N, H, W] or [N, C, H, W], none of them 0, "
            f"got {_checks._shape(images.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(
            f"{op}: expected labels of dtype int64, got {_checks._name(labels.dtype)}; "
            "convert them with .long()"
        )
    _checks._same_shape(op, "labels", labels, "[N]", [len(images)])
    low, high = (float(x) for x in images.aminmax())
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"{op}: expected images from 0 to 1, got {low:.4g} to {high:.4g}; "
            "streams normalise after they transform"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"{op}: expected labels of at least 0, got {int(labels.min())}")
    return images, labels
