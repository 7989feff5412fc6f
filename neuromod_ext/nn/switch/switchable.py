"""Several networks in one set of weights, told apart by fixed modulators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from neuromod_ext import functional
from neuromod_ext._ambient import claim, restored
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext.nn._fast_path import leave_fast_path, regain_fast_path
from neuromod_ext.nn.switch.inplace import Part, layer_blocks, parts
from neuromod_ext.nn.switch.layers import PLAIN, TIED, retyped, separable
from neuromod_ext.nn.switch.layout import Slot, flattened, layout
from neuromod_ext.nn.switch.modulator import Modulator
from neuromod_ext.nn.switch.states import State, coefficients
from neuromod_ext.nn.switch.tied import Ambient, Gained, Groups, Points, Tied
from neuromod_ext.nn.switch.vector import copied, write
from neuromod_ext.topology import Discrete


class Switchable(nn.Module):
    r"""A copy of a model that fixed modulators switch to other functions of its input.

    .. math:: w_j = M_j w, \qquad b_j = b + v_j; \qquad
        w(d) = w + \sum_j d_j (M_j w - w), \qquad b(d) = b + \sum_j d_j v_j

    w are all weights of the model as one vector, b all biases (:func:`layout` says which). State 0
    is the model itself, state j has modulator j; doses in [0, 1] lead from state 0 to the others.
    There are two ways to switch, and so two to learn:

    - ``model(x, state)``: the samples of a batch may have different states or doses, and nothing is
      changed. Gradients come back to w through Mᵀ: a step of descent in state 1 moves w by
      −η Mᵀ g', g' being the gradient with respect to w_1.
    - ``switch_()`` and ``switch_back_()``, the paper's way: parameters are mapped in place, trained
      where they are and mapped back, so that the same step moves w by −η M⁻¹ g'.

    The two agree for orthogonal M only. In place, the rounding of a round trip moves the weights by
    ``modulators[j - 1].round_trip_bound(dtype)`` of their norm at most; with ``keep_original`` it
    does not: w becomes w + M⁻¹ Δ, Δ being what happened to w_j, and stays as it is, bit for bit,
    where nothing did. That keeps two copies of the parameters while switched.

    Args:
        model: An ordinary model; it is not changed.
        *modulators: M_1, M_2 and so on, each of as many weights as the model has.
        shift: v, of as many numbers as the model has biases, [m]; for several modulators [J, m];
            0 if None.
        keep_original: Whether switching back is free of drift.

    Raises:
        TypeError: A modulator is none.
        ValueError: No modulator, sizes that do not fit, a shift that is not finite, a modulator too
            ill-conditioned for the model's dtype, or a model that :func:`layout` refuses.

    Source: "Neuromodulator-inspired task switching using a fixed weight-space transformation".
    """

    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        *modulators: Modulator,
        shift: Tensor | None = None,
        keep_original: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout(model)
        _check_modulators(modulators, self.layout.num_weights, self.layout.dtype)
        self.module = retyped(copy.deepcopy(model), TIED)
        leave_fast_path(self.module)
        self.modulators = cast(Sequence[Modulator], nn.ModuleList(modulators))
        self.register_buffer("shift", self._checked_shift(shift))
        self.keep_original = keep_original
        self._states = Discrete(len(modulators) + 1)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._frozen: tuple[dict[str, Points], list[tuple[int, int, int]]] | None = None

    @property
    def state(self) -> int:
        """The state in which the parameters are: 0, unless switched in place."""
        return self._layers()[0].state

    def forward(self, input: Any, state: State | None = None, *args: Any, **kwargs: Any) -> Any:
        """Call the model, in one or several states.

        Args:
            input: The model's first argument.
            state: An integer, or integers [B], for the state of all samples or of each; a floating
                number or tensor for doses, [] or [B], with several modulators [J] or [B, J]. None
                leaves parameters as they are, also while switched in place.
            *args: The model's further arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What the model returns.

        Raises:
            TypeError: A state of no such dtype.
            ValueError: A state or dose out of its domain (NaN in compiled code), or not one for
                each sample.
            RuntimeError: Switched in place and called with a state; layers in use by another call;
                parameters changed while :meth:`frozen`.
        """
        if state is None:
            return self.module(input, *args, **kwargs)
        named = self._named_layers()
        layers = [layer for _, layer in named]
        if layers[0].state != 0:
            raise RuntimeError(
                "Switchable: expected parameters in state 0 for a call with a state, got state "
                f"{layers[0].state}; call switch_back_() first, or leave the state out"
            )
        coeff, states = self.coefficients(state)
        points = self._points() if self._frozen is None else self._frozen_points()
        num_states = self._states.n
        groups = None
        if states is not None and not all(layer.only_gained for layer in points.values()):
            groups = Groups.of(states, num_states)

        def around(path: str, alone: int | None = None) -> Ambient:
            here = coeff
            if alone is not None:
                here = torch.eye(num_states, dtype=coeff.dtype, device=coeff.device)[alone]
            return Ambient(points[path], here, states, groups, alone)

        def call(alone: int, input: Any) -> Any:
            for path, layer in named:
                layer.ambient = around(path, alone)
            return self.module(input, *args, **kwargs)

        if not claim("ambient", [(layer, around(path)) for path, layer in named]):
            raise RuntimeError(
                "Switchable: expected layers that no other call is using, got layers whose state "
                "is set; give each thread a copy of the model"
            )
        try:
            work = self.layout.num_weights
            if groups is not None and groups.serve(input, work) and separable(self.module):
                return groups.each(call, input)
            return self.module(input, *args, **kwargs)
        finally:
            for layer in layers:
                layer.ambient = None

    def coefficients(self, state: State) -> tuple[Tensor, Tensor | None]:
        """The weight c of each state at some states or doses, and the states where they are such.

        Args:
            state: As in :meth:`forward`.

        Returns:
            c, [B, K] or [K], K states; and the states, [B], or None.
        """
        dtype = accumulation_dtype(self.layout.dtype)
        return coefficients(state, self._states, dtype, self.shift.device)

    @contextmanager
    def frozen(self) -> Iterator[Switchable]:
        """Map the weights once for all calls in a ``with`` block: for inference.

        No gradients come back to the weights from there. A call in the block raises RuntimeError
        if the parameters have changed since it began.
        """
        with torch.no_grad():
            self._frozen = self._points(), self._versions()
        try:
            yield self
        finally:
            self._frozen = None

    def _frozen_points(self) -> dict[str, Points]:
        assert self._frozen is not None
        points, versions = self._frozen
        if versions != self._versions():
            raise RuntimeError(
                "Switchable: expected parameters that stay as they are while frozen, got changed "
                "ones; leave the block first"
            )
        return points

    def _versions(self) -> list[tuple[int, int, int]]:
        slots = (*self.layout.weights, *self.layout.biases)
        parameters = [slot.of(self.module) for slot in slots]
        return [(id(p), p.data_ptr(), p._version) for p in (*parameters, self.shift)]

    def points(self) -> dict[str, dict[str, Tensor]]:
        """Every switched parameter in all states, [K, ...], by layer and name; differentiable."""
        return {path: layer.stacked() for path, layer in self._points().items()}

    def _points(self) -> dict[str, Points]:
        """The same, not stacked, and gains of rows as such."""
        found = {path: Points() for path, _ in self._named_layers()}
        for slot, weight in zip(self.layout.weights, self._weights(), strict=True):
            found[slot.module].weights[slot.name] = weight
        if self.layout.biases:
            sizes = [slot.shape.numel() for slot in self.layout.biases]
            b = flattened(self.module, self.layout.biases)
            moved = zip(*((b + v).split(sizes) for v in self.shift), strict=True)
            for slot, others in zip(self.layout.biases, moved, strict=True):
                found[slot.module].biases[slot.name] = (self._own(slot), *others)
        return found

    def _weights(self) -> list[tuple[Tensor, ...] | Gained]:
        slots = self.layout.weights
        sizes = [slot.shape.numel() for slot in slots]
        by_slot: list[Sequence[Modulator | Tensor]] = []  # or what it makes of the weight there
        for modulator in self.modulators:
            blocks = layer_blocks(self.layout, modulator)
            if blocks is None:
                blocks = modulator(flattened(self.module, slots)).split(sizes)
            by_slot.append(blocks)
        found: list[tuple[Tensor, ...] | Gained] = []
        for slot, *modulators in zip(slots, *by_slot, strict=True):
            own = self._own(slot)
            gained = Gained.of(own, modulators)
            found.append(gained or (own, *(_moved(own, modulator) for modulator in modulators)))
        return found

    def _own(self, slot: Slot) -> Tensor:
        """A parameter; where no gradient is taken, one that no later call takes one of either."""
        own: Tensor = slot.of(self.module)
        return own if torch.is_grad_enabled() else own.detach()

    @torch.no_grad()
    def switch_(self, state: int = 1) -> None:
        """Map the parameters in place to a state: w ← M w, b ← b + v.

        Raises:
            RuntimeError: They are in a state other than 0 already.
            ValueError: There is no such state.
        """
        if isinstance(state, bool) or not 1 <= state <= len(self.modulators):
            raise ValueError(
                f"switch_: expected a state from 1 to {len(self.modulators)}, got {state}"
            )
        if self.state != 0:
            raise RuntimeError(
                f"switch_: expected parameters in state 0, got state {self.state}; "
                "call switch_back_() first"
            )
        for part in self._parts(state):
            parameters = [slot.of(self.module) for slot in part.slots]
            old = copied(parameters) if self.keep_original else None
            part.overwrite(parameters, False)
            if old is not None:
                self._kept.append((old, copied(parameters)))
        self._set_state(state)

    @torch.no_grad()
    def switch_back_(self) -> None:
        """Map the parameters in place back to state 0: w ← M⁻¹ w, b ← b − v.

        Raises:
            RuntimeError: They are in state 0.
        """
        if self.state == 0:
            raise RuntimeError("switch_back_: expected switched parameters, got state 0")
        for i, part in enumerate(self._parts(self.state)):
            parameters = [slot.of(self.module) for slot in part.slots]
            if self.keep_original:
                old, new = self._kept[i]
                moved = part.back_moved(copied(parameters) - new)
                write(parameters, torch.where(moved == 0, old, old + moved))
            else:
                part.overwrite(parameters, True)
        self._kept = []
        self._set_state(0)

    @contextmanager
    def switched(self, state: int = 1) -> Iterator[Switchable]:
        """``switch_`` for the time of a ``with`` block."""
        self.switch_(state)
        try:
            yield self
        finally:
            self.switch_back_()

    @torch.no_grad()
    def fold(self, state: State = 0) -> nn.Module:
        """An ordinary copy of the model at one state or dose, to export and deploy.

        Raises:
            RuntimeError: The parameters are switched in place.
            ValueError: Not one state or dose.
        """
        if self.state != 0:
            raise RuntimeError(f"fold: expected parameters in state 0, got state {self.state}")
        coeff, _ = self.coefficients(state)
        if coeff.dim() != 1:
            raise ValueError(f"fold: expected one state or dose, got {len(coeff)}")
        plain = retyped(copy.deepcopy(self.module), PLAIN)
        regain_fast_path(plain)
        picked = int(coeff.argmax()) if bool((coeff == 1).any()) else None
        for path, layer in self.points().items():
            for name, basis in layer.items():
                value = (
                    functional.interpolate_weights(basis, coeff)
                    if picked is None
                    else basis[picked]
                )
                plain.get_submodule(path).get_parameter(name).copy_(value)
        return plain

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For ``torch.utils.checkpoint(..., use_reentrant=False, context_fn=...)``.

        Returns:
            A context for the first run, which changes nothing, and one for the recomputation, in
            which the layers have the states they have now.
        """
        now = [(layer, layer.ambient) for layer in self._layers()]
        return nullcontext(), restored("ambient", now)

    def extra_repr(self) -> str:
        """The sizes of the two vectors."""
        return f"num_weights={self.layout.num_weights}, num_biases={self.layout.num_biases}"

    def _named_layers(self) -> list[tuple[str, Tied]]:
        named = self.module.named_modules()
        return [(path, module) for path, module in named if isinstance(module, Tied)]

    def _layers(self) -> list[Tied]:
        return [layer for _, layer in self._named_layers()]

    def _set_state(self, state: int) -> None:
        for layer in self._layers():
            layer.state = state

    def _parts(self, state: int) -> list[Part]:
        return parts(self.layout, self.modulators[state - 1], self.shift[state - 1])

    def _checked_shift(self, shift: Tensor | None) -> Tensor:
        count, size = len(self.modulators), self.layout.num_biases
        like = next(self._layers()[0].parameters())
        if shift is None:
            return like.new_zeros(count, size)
        if shift.shape != (count, size) and (count > 1 or shift.shape != (size,)):
            raise ValueError(
                f"Switchable: expected shift of shape [J, m] = [{count}, {size}], a number for "
                f"each bias, got {list(shift.shape)}"
            )
        if not shift.isfinite().all():
            raise ValueError("Switchable: expected shift to be finite, got a NaN or an infinity")
        return shift.detach().to(like).reshape(count, size).clone()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Switchable:
        if self._frozen is not None:
            raise RuntimeError(
                "Switchable: expected no conversion while frozen, got one; leave the block first"
            )
        if self._kept:
            raise RuntimeError(
                "Switchable: expected parameters in state 0 for a conversion, got state "
                f"{self.state}; call switch_back_() first"
            )
        super()._apply(fn)
        dtype = next(self._layers()[0].parameters()).dtype
        self.layout = replace(self.layout, dtype=dtype)
        for modulator in self.modulators:
            modulator.check(dtype)
        return self


def _moved(weight: Tensor, modulator: Modulator | Tensor) -> Tensor:
    moved = modulator if isinstance(modulator, Tensor) else modulator(weight.flatten())
    return moved.view(weight.shape)


def _check_modulators(modulators: Sequence[Modulator], size: int, dtype: torch.dtype) -> None:
    if not modulators:
        raise ValueError("Switchable: expected at least one modulator, got none")
    for modulator in modulators:
        if not isinstance(modulator, Modulator):
            raise TypeError(
                f"Switchable: expected modulators, got {type(modulator).__name__}; "
                "for example neuromod_ext.nn.switch.Hadamard(n, seed)"
            )
        if modulator.size != size:
            raise ValueError(
                f"Switchable: expected modulators of {size} weights, got one of {modulator.size}; "
                "layout(model).num_weights counts them"
            )
        modulator.check(dtype)
