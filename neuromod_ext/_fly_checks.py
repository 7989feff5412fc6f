"""The errors of the fly-hash ops, in Python; see :mod:`neuromod_ext._checks`."""

from __future__ import annotations

import torch
from torch import Tensor

from neuromod_ext._checks import _device_like, _floating, _like, _name, _rank, _same_shape

_MOST_INPUTS = 2**28 - 1


def _index(op: str, index: Tensor, like_name: str, like: Tensor, inputs: int) -> None:
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: expected index of dtype int32 or int64, got {_name(index.dtype)}; "
            "convert it with .long()"
        )
    _device_like(op, "index", index, like_name, like)
    _rank(op, "index", index, 2, "[H, n]")
    if inputs > _MOST_INPUTS:
        raise ValueError(f"{op}: expected input of at most {_MOST_INPUTS} features, got {inputs}")


def _readout(
    op: str,
    input: Tensor,
    index: Tensor,
    gain: Tensor,
    readout: Tensor,
    task: Tensor | None,
    like_name: str,
    like: Tensor,
) -> None:
    units = index.shape[0]
    _like(op, "gain", gain, like_name, like)
    if task is None:
        _same_shape(op, "gain", gain, "[H]", [units])
    else:
        _rank(op, "gain", gain, 2, "[T, H]")
        _same_shape(op, "gain", gain, "[T, H]", [gain.shape[0], units])
    _like(op, "readout", readout, like_name, like)
    _rank(op, "readout", readout, 2, "[O, H]")
    _same_shape(op, "readout", readout, "[O, H]", [readout.shape[0], units])
    if task is not None:
        task_ids(op, task, input.shape[0], like_name, like)


def task_ids(op: str, task: Tensor, batch: int, like_name: str, like: Tensor) -> None:
    if task.dtype != torch.int64:
        raise TypeError(
            f"{op}: expected task of dtype int64, got {_name(task.dtype)}; convert it with .long()"
        )
    _device_like(op, "task", task, like_name, like)
    _same_shape(op, "task", task, "[B]", [batch])


def fly_hash(input: Tensor, index: Tensor) -> None:
    op = "fly_hash"
    _floating(op, "input", input)
    _rank(op, "input", input, 2, "[B, I]")
    _index(op, index, "input", input, input.shape[1])


def fly_readout(
    input: Tensor, index: Tensor, gain: Tensor, readout: Tensor, task: Tensor | None
) -> None:
    op = "fly_readout"
    _floating(op, "input", input)
    _rank(op, "input", input, 2, "[B, I]")
    _index(op, index, "input", input, input.shape[1])
    _readout(op, input, index, gain, readout, task, "input", input)


def _gradient(op: str, grad_output: Tensor, input: Tensor, index: Tensor) -> None:
    _floating(op, "grad_output", grad_output)
    _like(op, "input", input, "grad_output", grad_output)
    _rank(op, "input", input, 2, "[B, I]")
    _index(op, index, "grad_output", grad_output, input.shape[1])


def fly_hash_backward(grad_output: Tensor, input: Tensor, index: Tensor) -> None:
    op = "fly_hash_backward"
    _gradient(op, grad_output, input, index)
    want = [input.shape[0], index.shape[0]]
    _same_shape(op, "grad_output", grad_output, "[B, H]", want)


def fly_readout_backward(
    grad_output: Tensor,
    input: Tensor,
    index: Tensor,
    gain: Tensor,
    readout: Tensor,
    task: Tensor | None,
) -> None:
    op = "fly_readout_backward"
    _gradient(op, grad_output, input, index)
    _readout(op, input, index, gain, readout, task, "grad_output", grad_output)
    want = [input.shape[0], readout.shape[0]]
    _same_shape(op, "grad_output", grad_output, "[B, O]", want)


def gain_linear(
    input: Tensor, gain: Tensor, weight: Tensor, bias: Tensor | None, task: Tensor | None
) -> None:
    op = "gain_linear"
    _floating(op, "input", input)
    _rank(op, "input", input, 1 if task is None else 2, "[B, ..., I]", exact=False)
    _like(op, "gain", gain, "input", input)
    _like(op, "weight", weight, "input", input)
    _rank(op, "weight", weight, 2, "[O, I]")
    inputs = weight.shape[1]
    _same_shape(op, "input", input, "[..., I]", [-1, inputs])
    if task is None:
        _same_shape(op, "gain", gain, "[I]", [inputs])
    else:
        _rank(op, "gain", gain, 2, "[T, I]")
        _same_shape(op, "gain", gain, "[T, I]", [gain.shape[0], inputs])
        task_ids(op, task, input.shape[0], "input", input)
    if bias is not None:
        _like(op, "bias", bias, "input", input)
        _same_shape(op, "bias", bias, "[O]", [weight.shape[0]])
