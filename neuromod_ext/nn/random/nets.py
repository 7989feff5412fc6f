"""Networks of fixed random weights, which tasks modulate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from neuromod_ext import functional
from neuromod_ext.nn.random.layers import FlyHash, RandomConv2d, RandomLinear
from neuromod_ext.nn.random.modulation import ContextModulation, Task


class _Modulated(nn.Module):
    """A network whose modulations all have the same tasks."""

    def modulations(self) -> list[ContextModulation]:
        """Those of its layers, in order."""
        return [m for m in self.modules() if isinstance(m, ContextModulation)]

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return self.modulations()[0].num_tasks

    def add_task(self) -> int:
        """Draw the parameters of a new task, and make it the current one; its number."""
        return {modulation.add_task() for modulation in self.modulations()}.pop()

    def use_task(self, task: int) -> None:
        """Take this task where a call names none; ValueError if there is no such task."""
        for modulation in self.modulations():
            modulation.use_task(task)

    def freeze_task(self, task: int | None = None) -> None:
        """Train a task (the current one by default) no more; ValueError if there is none."""
        for modulation in self.modulations():
            modulation.freeze_task(task)

    def is_frozen(self, task: int) -> bool:
        """Whether a task is frozen; ValueError if there is no such task."""
        return self.modulations()[0].is_frozen(task)

    def task_parameters(self, task: int | None = None) -> Iterator[Parameter]:
        """All parameters of a task, the current one by default: for an optimizer."""
        for modulation in self.modulations():
            yield from modulation.task_parameters(task)


class FlyNet(_Modulated):
    r"""The fly's olfactory circuit as a continual learner: all weights random, a context trained.

    .. math:: y = \alpha_t R\,(v_t \odot \text{fly\_hash}(x))

    Each task trains v_t and α_t, hidden_features + 1 numbers, and leaves those of other tasks
    alone: once trained, a task's outputs stay the same to the bit. The hidden layer is never
    written to memory, see :func:`neuromod_ext.functional.fly_readout`.

    Args:
        in_features: I, of the flattened input.
        hidden_features: H, the units of the hash.
        out_features: O.
        fan_in: n, the inputs of each unit.
        num_tasks: Tasks to begin with.
        device: As in torch.nn.
        dtype: As in torch.nn.
        seed: What the index of the hash and R are drawn from.

    Shapes: input [B, ...] of I features a sample, output [B, O].

    Source: Hong and Pavlic; sizes as in the authors' notebook on MNIST.
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden_features: int = 7840,
        out_features: int = 10,
        fan_in: int = 7,
        num_tasks: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.hash = FlyHash(in_features, hidden_features, fan_in, device, seed=seed)
        self.readout = RandomLinear(
            hidden_features, out_features, device, dtype, seed=seed, stream=1
        )
        self.modulation = ContextModulation(hidden_features, num_tasks, device=device, dtype=dtype)

    def forward(self, input: Tensor, task: Task | None = None) -> Tensor:
        """The logits.

        Args:
            input: x, [B, ...].
            task: One task, or each sample's, [B] int64; the current one if None.

        Returns:
            y, [B, O].

        Raises:
            ValueError: A shape that does not fit; a task that does not exist, or, in training mode
                with gradients recorded, a frozen one.
            TypeError: A dtype that does not fit.
        """
        input = self._flattened(input)
        selection = self.modulation.select(task, input.shape[0])
        logits = functional.fly_readout(
            input, self.hash.index, selection.gain, self.readout.weight, selection.task
        )
        return selection.strengthen(logits)

    def representation(self, input: Tensor, task: Task | None = None) -> Tensor:
        """Z = α_t v_t ⊙ h, [B, H]: what the readout reads."""
        modulated: Tensor = self.modulation(self.hash(self._flattened(input)), task)
        return modulated

    def _flattened(self, input: Tensor) -> Tensor:
        """Each sample as a row of I features."""
        rows = input.flatten(1) if input.dim() > 1 else input
        self.hash.check_features("FlyNet", rows)
        return rows


class NeuroModNet(_Modulated):
    r"""Dense or convolutional layers of fixed random weights, each modulated for each task.

    .. math:: x^{(l + 1)} = \mathrm{relu}\big(\alpha^{(l)}_t W^{(l)} (v^{(l)}_t \odot x^{(l)})\big)

    without the rectifier after the last one. Sizes are our choice; so is what lies between layers.

    Args:
        layers: :class:`RandomLinear` and :class:`RandomConv2d`, which are modulated, and other
            modules (rectifiers, pooling), which are applied as they are and should have nothing to
            train.
        num_tasks: Tasks to begin with.

    Source: the layer-wise form of Hong and Pavlic's modulation.
    """

    def __init__(self, layers: Sequence[nn.Module], num_tasks: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.modulation = nn.ModuleList()
        for layer in layers:
            if isinstance(layer, RandomLinear | RandomConv2d):
                linear = isinstance(layer, RandomLinear)
                features: int = layer.in_features if linear else layer.in_channels  # type: ignore[assignment]
                self.modulation.append(
                    ContextModulation(
                        features,
                        num_tasks,
                        device=layer.weight.device,
                        dtype=layer.weight.dtype,
                    )
                )
        if not self.modulation:
            raise ValueError(
                "NeuroModNet: expected a RandomLinear or RandomConv2d among the layers, got none"
            )

    @classmethod
    def dense(
        cls,
        sizes: Sequence[int] = (784, 1000, 1000, 10),
        num_tasks: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        seed: int = 0,
    ) -> NeuroModNet:
        """Linear layers of these sizes, of the flattened input, with rectifiers between them."""
        layers: list[nn.Module] = [nn.Flatten()]
        for stream, (inputs, outputs) in enumerate(pairwise(sizes)):
            layers += [RandomLinear(inputs, outputs, device, dtype, seed=seed, stream=stream)]
            layers += [nn.ReLU()]
        return cls(layers[:-1], num_tasks)

    @classmethod
    def conv(
        cls,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        out_features: int = 10,
        size: int = 28,
        num_tasks: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        seed: int = 0,
    ) -> NeuroModNet:
        """3 × 3 convolutions, each rectified and pooled by 2, and a linear layer.

        Args:
            in_channels: Of the images, [B, in_channels, size, size].
            channels: Of each convolution.
            out_features: O.
            size: Of the images' sides.
            num_tasks: Tasks to begin with.
            device: As in torch.nn.
            dtype: As in torch.nn.
            seed: What all weights are drawn from.
        """
        layers: list[nn.Module] = []
        for stream, outputs in enumerate(channels):
            layers += [
                RandomConv2d(
                    in_channels, outputs, 3, 1, 1, 1, 1, device, dtype, seed=seed, stream=stream
                ),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            in_channels, size = outputs, size // 2
        last = RandomLinear(
            in_channels * size**2, out_features, device, dtype, seed=seed, stream=len(channels)
        )
        return cls([*layers, nn.Flatten(), last], num_tasks)

    def forward(self, input: Tensor, task: Task | None = None) -> Tensor:
        """The output for each sample; arguments and errors as of :meth:`FlyNet.forward`."""
        modulations = iter(self.modulation)
        for layer in self.layers:
            if isinstance(layer, RandomLinear | RandomConv2d):
                selection = next(modulations).select(task, input.shape[0])  # type: ignore[operator]
                input = selection.strengthen(layer(input, selection.gain, selection.task))
            else:
                input = layer(input)
        return input
