"""What a task modulates: a gain for each input of a fixed layer, and a strength for all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter, init

Task = int | Tensor


class Selection(NamedTuple):
    """What a batch is modulated by.

    Attributes:
        gain: v, [F] for one task, or [T, F] for several.
        strength: α, [1] or [T, 1], or None.
        task: Each sample's row of these, [B], or None for one task.
    """

    gain: Tensor
    strength: Tensor | None
    task: Tensor | None

    def strengthen(self, output: Tensor) -> Tensor:
        """α_t y, [B, ...], in the dtype of y."""
        if self.strength is None:
            return output
        strength = self.strength.to(output.dtype)
        if self.task is not None:
            strength = strength.index_select(0, self.task)
            strength = strength.reshape(-1, *[1] * (output.dim() - 1))
        return output * strength


class ContextModulation(nn.Module):
    r"""For each task t, a gain v_t of every feature and one strength α_t: all that is trained.

    .. math:: z_b = \alpha_{t(b)}\, v_{t(b)} \odot x_b

    A task is a number, in the order in which tasks are added. Each has parameters of its own, drawn
    xavier-normal: v_t as a [1, F] matrix (standard deviation √(2 / (F + 1))), α_t as [1, 1]
    (standard deviation 1); that these are the shapes is our choice.

    A frozen task is for inference alone. Its parameters require no gradient and hold none, so that
    an optimizer that has them passes them over, weight decay and momentum included; a call in
    training mode, where gradients are recorded, refuses it. Tasks, and which of them are frozen,
    are in the state_dict; a module that loads one gets the tasks that it lacks.

    Args:
        features: F.
        num_tasks: Tasks to begin with.
        strength: Whether there is an α_t.
        device: As in torch.nn.
        dtype: As in torch.nn.

    Shapes: ``gain[t]`` [F], ``strength[t]`` [1], input [B, ..., F].

    Source: local and global modulation of configurable random weight networks, Hong and Pavlic.
    """

    current: int | None  # the task of a call that names none

    def __init__(
        self,
        features: int,
        num_tasks: int = 0,
        *,
        strength: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.current = features, None
        self._empty = torch.empty(0, device=device, dtype=dtype)  # where new tasks go
        self._frozen: list[bool] = []
        self.gain = nn.ParameterList()
        self.strength = nn.ParameterList() if strength else None
        for _ in range(num_tasks):
            self.add_task()

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.gain)

    def add_task(self) -> int:
        """Draw the parameters of a new task, and make it the current one; its number."""
        like = self.gain[0] if len(self.gain) else self._empty
        gain = like.new_empty(1, self.features)
        self.gain.append(Parameter(init.xavier_normal_(gain).squeeze(0)))
        if self.strength is not None:
            self.strength.append(Parameter(init.xavier_normal_(like.new_empty(1, 1)).squeeze(0)))
        self._frozen.append(False)
        self.current = self.num_tasks - 1
        return self.current

    def use_task(self, task: int) -> None:
        """Take this task where a call names none.

        Raises:
            ValueError: There is no such task.
        """
        self.current = self._known(task)

    def freeze_task(self, task: int | None = None) -> None:
        """Train a task (the current one by default) no more.

        Raises:
            ValueError: There is no such task.
        """
        self._set_frozen(self._known(task), True)

    def is_frozen(self, task: int) -> bool:
        """Whether a task is frozen.

        Raises:
            ValueError: There is no such task.
        """
        return self._frozen[self._known(task)]

    def task_parameters(self, task: int | None = None) -> Iterator[Parameter]:
        """The parameters of a task, the current one by default: for an optimizer.

        Raises:
            ValueError: There is no such task.
        """
        number = self._known(task)
        yield self.gain[number]
        if self.strength is not None:
            yield self.strength[number]

    @torch.no_grad()
    def context_vectors(self) -> Tensor:
        """α_t v_t of every task, [T, F]."""
        if self.num_tasks == 0:
            return self._empty.new_empty(0, self.features)
        gain = torch.stack(list(self.gain))
        return gain if self.strength is None else gain * torch.stack(list(self.strength))

    def select(self, task: Task | None, batch: int) -> Selection:
        """The modulation of a batch; a module that has one calls this.

        Args:
            task: One task, or each sample's, [B] int64; the current one if None. Tasks of samples
                are looked at, which waits for the device they are on; keep them on the CPU. Under
                ``torch.compile`` and ``torch.export`` nothing is looked at: a frozen task gets no
                gradient, and one that does not exist is an error of the op that takes it.
            batch: B.

        Raises:
            ValueError: A task that does not exist, or, where it would be trained, a frozen one.
            TypeError: ``task`` is neither.
        """
        if isinstance(task, Tensor) and task.dim() > 0:
            return self._select_samples(task, batch)
        number = self._trainable(self._known(task))
        strength = None if self.strength is None else self._parameter(self.strength, number)
        return Selection(self._parameter(self.gain, number), strength, None)

    def _select_samples(self, task: Tensor, batch: int) -> Selection:
        name = type(self).__name__
        if task.dtype != torch.int64:
            raise TypeError(
                f"{name}: expected task of dtype int64, got {task.dtype}; convert it with .long()"
            )
        if tuple(task.shape) != (batch,):
            raise ValueError(
                f"{name}: expected task of shape [B] = [{batch}], got {list(task.shape)}"
            )
        rows = task
        if torch.compiler.is_compiling():
            numbers = list(range(self.num_tasks))
        else:
            distinct, rows = torch.unique(task, return_inverse=True)
            numbers = [self._trainable(self._known(number)) for number in distinct.tolist()]
        if not numbers:  # no sample
            return Selection(self._empty.new_empty(0, self.features), self._no_strength(), rows)
        gain = torch.stack([self._parameter(self.gain, number) for number in numbers])
        strength = None
        if self.strength is not None:
            strength = torch.stack([self._parameter(self.strength, number) for number in numbers])
        return Selection(gain, strength, rows.to(gain.device))

    def _no_strength(self) -> Tensor | None:
        return None if self.strength is None else self._empty.new_empty(0, 1)

    def forward(self, input: Tensor, task: Task | None = None) -> Tensor:
        """Z of x, [B, ..., F]; ``task`` as in :meth:`select`."""
        if input.dim() < 2 or input.shape[-1] != self.features:
            raise ValueError(
                f"{type(self).__name__}: expected input of shape [B, ..., F] = "
                f"[..., {self.features}], got {list(input.shape)}"
            )
        selection = self.select(task, input.shape[0])
        gain, rows = selection.gain, selection.task
        if rows is not None:
            gain = gain.index_select(0, rows)
            gain = gain.reshape(-1, *[1] * (input.dim() - 2), self.features)
        return selection.strengthen(input * gain)

    def _parameter(self, parameters: nn.ParameterList, task: int) -> Tensor:
        """Detached if frozen, whatever has become of its requires_grad."""
        parameter: Tensor = parameters[task]
        return parameter.detach() if self._frozen[task] else parameter

    def _known(self, task: Any) -> int:
        name = type(self).__name__
        if task is None:
            task = self.current
            if task is None:
                raise ValueError(f"{name}: expected a task, got none; pass one or call use_task")
        if isinstance(task, Tensor) and task.dim() == 0 and task.dtype == torch.int64:
            task = int(task)
        if not isinstance(task, int) or isinstance(task, bool):
            raise TypeError(
                f"{name}: expected task to be a number or a Tensor of dtype int64, "
                f"got {task.dtype if isinstance(task, Tensor) else type(task).__name__}"
            )
        if not 0 <= task < self.num_tasks:
            raise ValueError(
                f"{name}: expected task in [0, T) = [0, {self.num_tasks}), got {task}; "
                "add_task makes new ones"
            )
        return task

    def _trainable(self, task: int) -> int:
        if self._frozen[task] and self.training and torch.is_grad_enabled():
            raise ValueError(
                f"{type(self).__name__}: expected a task that is not frozen while training, "
                f"got {task}; call eval() first, or torch.no_grad()"
            )
        return task

    def _set_frozen(self, task: int, frozen: bool) -> None:
        self._frozen[task] = frozen
        for parameter in self.task_parameters(task):
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None

    def get_extra_state(self) -> Tensor:
        """Which tasks are frozen, [T]."""
        return torch.tensor(self._frozen, dtype=torch.bool)

    def set_extra_state(self, state: Tensor) -> None:
        """Freeze these tasks, and no others."""
        for task, frozen in enumerate(state.tolist()[: self.num_tasks]):
            self._set_frozen(task, frozen)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        current = self.current
        while f"{prefix}gain.{self.num_tasks}" in state_dict:
            self.add_task()
        self.current = current
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> ContextModulation:
        super()._apply(fn, recurse)
        self._empty = fn(self._empty)
        return self

    def extra_repr(self) -> str:
        """The arguments, and the tasks there are."""
        return f"features={self.features}, num_tasks={self.num_tasks}"
