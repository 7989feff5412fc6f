"""The errors of the convolutions: those of the ops, in their words, and of the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from neuromod_ext._checks import (
    _accumulation_like,
    _floating,
    _like,
    _num_basis,
    _rank,
    _same_shape,
    _shape,
)


class Options(NamedTuple):
    """How a convolution walks over its input, as the ops take it: numbers for each dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def output_space(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """The sizes of the output's dimensions of space."""
        options = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in options]


def _letters(dims: int, prefix: str = "") -> str:
    return ", ".join(prefix + letter for letter in ("DHW"[3 - dims :] if dims > 1 else "L"))


def _basis(op: str, dims: int, basis: Tensor) -> None:
    _rank(op, "basis", basis, 3 + dims, f"[K, O, C / groups, {_letters(dims, 'k')}]")
    _num_basis(op, "basis", basis.shape[0])


def _groups(op: str, basis: Tensor, groups: int) -> None:
    O = basis.shape[1]
    if groups < 1 or O % groups != 0:
        raise ValueError(f"{op}: expected groups >= 1 that divides O = {O}, got {groups}")


def _channels(op: str, channels: int, basis: Tensor, groups: int) -> None:
    each = basis.shape[2]
    if channels != each * groups:
        raise ValueError(
            f"{op}: expected input of {each * groups} channels (basis.shape[2] * groups = {each} * "
            f"{groups}), got {channels}"
        )


def _bias(op: str, bias: Tensor | None, basis: Tensor) -> None:
    if bias is not None:
        _like(op, "bias", bias, "basis", basis)
        _same_shape(op, "bias", bias, "[K, O]", basis.shape[:2])


def _option(op: str, name: str, values: Sequence[int], dims: int, least: int) -> None:
    if any(isinstance(value, float) for value in values):
        raise TypeError(f"{op}: expected {name} of integers, got {_sizes(values)}")
    if len(values) != dims or any(value < least for value in values):
        raise ValueError(
            f"{op}: expected {name} of {dims} number{'s' if dims > 1 else ''} >= {least}, "
            f"got {_sizes(values)}"
        )
    if any(value >= 2**31 for value in values):
        raise ValueError(f"{op}: expected {name} below 2**31, got {_sizes(values)}")


def _sizes(values: Sequence[int]) -> str:
    """As :func:`_shape`, but a size of -1 is one."""
    return "[" + ", ".join(map(str, values)) + "]"


def _walk(op: str, size: Sequence[int], kernel: Sequence[int], options: Options) -> None:
    dims = len(size)
    _option(op, "stride", options.stride, dims, 1)
    _option(op, "padding", options.padding, dims, 0)
    _option(op, "dilation", options.dilation, dims, 1)
    if any(k < 1 for k in kernel):
        raise ValueError(
            f"{op}: expected basis with a kernel of at least 1 in every dimension, "
            f"got {_sizes(kernel)}"
        )
    padded = [n + 2 * p for n, p in zip(size, options.padding, strict=True)]
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, options.dilation, strict=True)]
    if any(span > n for span, n in zip(spans, padded, strict=True)):
        raise ValueError(
            f"{op}: expected basis with a kernel within the padded input {_sizes(padded)}, "
            f"got one that spans {_sizes(spans)}"
        )


def forward(
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    options: Options,
    op: str = "manifold_conv",
) -> list[int]:
    """Check a call of the op; the shape of its output."""
    _floating(op, "input", input)
    dims = input.dim() - 2
    if not 1 <= dims <= 3:
        raise ValueError(
            f"{op}: expected input of shape [B, C, ...] with one to three dimensions of space, "
            f"got {_shape(input.shape)}"
        )
    _like(op, "basis", basis, "input", input)
    _basis(op, dims, basis)
    _accumulation_like(op, "coeff", coeff, "basis", basis)
    _groups(op, basis, options.groups)
    _rank(op, "coeff", coeff, 2, "[B, K]")
    _same_shape(op, "coeff", coeff, "[B, K]", [input.shape[0], basis.shape[0]])
    _channels(op, input.shape[1], basis, options.groups)
    _bias(op, bias, basis)
    _walk(op, input.shape[2:], basis.shape[3:], options)
    space = options.output_space(input.shape[2:], basis.shape[3:])
    return [input.shape[0], basis.shape[1], *space]


def backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    options: Options,
) -> None:
    """Check a call of the op for all gradients."""
    op = "manifold_conv_backward"
    shape = forward(input, basis, coeff, bias, options, op)
    _like(op, "grad_output", grad_output, "input", input)
    symbols = f"[B, O, {_letters(len(shape) - 2)}]"
    _same_shape(op, "grad_output", grad_output, symbols, shape)


def function(
    op: str,
    dims: int,
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    groups: int,
) -> None:
    """Check the tensors of a public function: as the op, but one condition may serve a batch."""
    space = _letters(dims)
    _floating(op, "input", input)
    _like(op, "basis", basis, "input", input)
    _basis(op, dims, basis)
    _accumulation_like(op, "coeff", coeff, "basis", basis)
    _groups(op, basis, groups)
    K = basis.shape[0]
    one_condition = coeff.dim() == 1 or (coeff.dim() == 2 and coeff.shape[0] == 1)
    if not one_condition:
        _rank(op, "input", input, 2 + dims, f"[B, C, {space}]")
        _rank(op, "coeff", coeff, 2, "[B, K]")
        _same_shape(op, "coeff", coeff, "[B, K]", [input.shape[0], K])
    elif input.dim() not in (1 + dims, 2 + dims):
        raise ValueError(
            f"{op}: expected input of shape [B, C, {space}] or [C, {space}], "
            f"got {_shape(input.shape)}"
        )
    else:
        _same_shape(op, "coeff", coeff, "[..., K]", [-1, K])
    _channels(op, input.shape[-1 - dims], basis, groups)
    _bias(op, bias, basis)


def walk(
    op: str,
    input: Tensor,
    basis: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Options, list[int]]:
    """A public function's options, checked, and the zeros that 'same' adds on the far sides."""
    kernel = list(basis.shape[3:])
    dims = len(kernel)
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    _option(op, "stride", strides, dims, 1)
    _option(op, "dilation", dilations, dims, 1)
    far = [0] * dims
    if padding == "same":
        if any(value != 1 for value in strides):
            raise ValueError(
                f"{op}: expected a stride of 1 with padding='same', got {_sizes(strides)}"
            )
        around = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        paddings, far = [total // 2 for total in around], [total % 2 for total in around]
    elif padding == "valid":
        paddings = [0] * dims
    elif isinstance(padding, str):
        raise ValueError(f"{op}: expected padding of numbers, 'same' or 'valid', got {padding!r}")
    else:
        paddings = _each(padding, dims)
    options = Options(strides, paddings, dilations, groups)
    size = [n + f for n, f in zip(input.shape[-dims:], far, strict=True)]
    _walk(op, size, kernel, options)
    return options, far


def _each(values: int | Sequence[int], dims: int) -> list[int]:
    """One number for each dimension, as torch.nn.functional takes them: one for all, too."""
    if not isinstance(values, Sequence):
        return [values] * dims
    return list(values) * dims if len(values) == 1 else list(values)
