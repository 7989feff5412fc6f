"""Switchable GRU and LSTM: torch's own, step by step where samples have states of their own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromod_ext.nn.switch.tied import Ambient, Tied


class _TiedRecurrent(Tied):
    """With points around the call, each sample runs with its own weights, in plain operations.

    All time steps of a layer's input enter its gates at once; the state's part goes step by step.
    Like torch's own, these layers are compiled only with ``torch._dynamo.config.allow_rnn``.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's, or with the points around the call.

        Raises:
            NotImplementedError: With points: a packed sequence, an input without a batch, or a
                projection.
        """
        if self.ambient is None:
            self._expect_no_backward()
            return super().forward(input, hx)
        net: Any = self
        if not isinstance(input, Tensor) or input.dim() != 3 or net.proj_size:
            raise NotImplementedError(
                f"{type(self).__name__}: expected a batch of sequences and no proj_size for a call "
                "with states, got another; fold(state) gives torch's own layer"
            )
        x = input if net.batch_first else input.transpose(0, 1)
        first = self._initial(hx, x)
        last: list[tuple[Tensor, ...]] = []
        directions = ("", "_reverse") if net.bidirectional else ("",)
        for layer in range(net.num_layers):
            if layer and net.dropout:
                x = F.dropout(x, net.dropout, self.training)
            outputs = []
            for suffix in directions:
                begin = tuple(part[len(last)] for part in first)
                sequence = x.flip(1) if suffix else x
                out, end = self._layer(self.ambient, f"l{layer}{suffix}", sequence, begin)
                outputs.append(out.flip(1) if suffix else out)
                last.append(end)
            x = torch.cat(outputs, -1)
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return x if net.batch_first else x.transpose(0, 1), ends if len(ends) > 1 else ends[0]

    def _initial(self, hx: Any, x: Tensor) -> tuple[Tensor, ...]:
        """The states before the first step, [layers, B, H] each: one of a GRU, two of an LSTM."""
        net: Any = self
        if hx is not None:
            return hx if isinstance(hx, tuple) else (hx,)
        layers = net.num_layers * (2 if net.bidirectional else 1)
        zeros = x.new_zeros(layers, len(x), net.hidden_size)
        return (zeros, zeros) if isinstance(self, nn.LSTM) else (zeros,)

    def _layer(
        self, ambient: Ambient, name: str, x: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        from_input = ambient.linear(x, f"weight_ih_{name}", f"bias_ih_{name}")
        outputs = []
        for step in from_input.unbind(1):
            from_state = ambient.linear(state[0], f"weight_hh_{name}", f"bias_hh_{name}")
            state = self._step(step, from_state, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state

    @abstractmethod
    def _step(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...


class TiedGRU(_TiedRecurrent, nn.GRU):
    """``torch.nn.GRU``."""

    def _step(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = x.chunk(3, -1), h.chunk(3, -1)
        update = (update_x + update_h).sigmoid()
        new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
        return ((1 - update) * new + update * state[0],)


class TiedLSTM(_TiedRecurrent, nn.LSTM):
    """``torch.nn.LSTM``."""

    def _step(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        enter, forget, new, leave = (x + h).chunk(4, -1)
        cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * cell.tanh(), cell
