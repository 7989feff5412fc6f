"""The errors of the ops, in Python: the twin of ``csrc/common/checks.h``.

Kernels check their own arguments. These checks run where no kernel does: in the fakes that
``torch.compile`` traces, and in the pure-PyTorch reference. A test compares the words of both.

Form: ``<op>: expected <argument> <requirement>, got <actual>[; <remedy>]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, coefficients and metrics: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device; some, such as meta, have none.

    torch has no public way to ask whether it is on at all, which is a tenth of the time.
    """
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return False
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def tensors(op: str, **arguments: object) -> None:
    """Every argument is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(value).__name__}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(sizes: Sequence[int]) -> str:
    return "[" + ", ".join("..." if size == -1 else str(size) for size in sizes) + "]"


def _floating(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        raise TypeError(
            f"{op}: expected {name} of dtype float64, float32, bfloat16 or float16, "
            f"got {_name(t.dtype)}"
        )


def _device_like(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(
            f"{op}: expected {name} on {like.device} (where {like_name} is), got {t.device}; "
            "move one of them"
        )


def _like(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.dtype != like.dtype:
        raise TypeError(
            f"{op}: expected {name} of dtype {_name(like.dtype)} (that of {like_name}), "
            f"got {_name(t.dtype)}; convert one of them"
        )
    _device_like(op, name, t, like_name, like)


def _accumulation_like(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    want = accumulation_dtype(like.dtype)
    if t.dtype != want:
        raise TypeError(
            f"{op}: expected {name} of dtype {_name(want)} (in which sums over "
            f"{_name(like.dtype)} {like_name} run), got {_name(t.dtype)}; "
            f"convert it with .to({want})"
        )
    _device_like(op, name, t, like_name, like)


def _rank(op: str, name: str, t: Tensor, rank: int, symbols: str, *, exact: bool = True) -> None:
    if t.dim() < rank or (exact and t.dim() != rank):
        raise ValueError(f"{op}: expected {name} of shape {symbols}, got {_shape(t.shape)}")


def _same_shape(op: str, name: str, t: Tensor, symbols: str, want: Sequence[int]) -> None:
    """The shape equals ``want``; one -1 in it stands for any number of dimensions."""
    got = t.shape
    if -1 in want:
        head = list(want).index(-1)
        tail = len(want) - head - 1
        same = (
            len(got) >= head + tail
            and tuple(got[:head]) == tuple(want[:head])
            and tuple(got[len(got) - tail :]) == tuple(want[head + 1 :])
        )
    else:
        same = tuple(got) == tuple(want)
    if not same:
        raise ValueError(
            f"{op}: expected {name} of shape {symbols} = {_shape(want)}, got {_shape(got)}"
        )


def written_memory(op: str, read: dict[str, Tensor | None], **written: Tensor | None) -> None:
    """What is written has one place for each element, shared with nothing else."""
    before: dict[str, Tensor] = {}
    for name, t in written.items():
        if t is None:
            continue
        if torch._debug_has_internal_overlap(t) == 1:
            raise ValueError(
                f"{op}: expected {name} without overlapping elements, got an expanded one; clone it"
            )
        for other_name, other in before.items():
            _apart(op, name, t, other_name, other)
        for read_name, source in read.items():
            if source is not None:
                _apart(op, read_name, source, name, t)
        before[name] = t


def _apart(op: str, name: str, t: Tensor, written_name: str, written: Tensor) -> None:
    if t.numel() == 0 or written.numel() == 0:
        return
    if t.untyped_storage().data_ptr() != written.untyped_storage().data_ptr():
        return
    (first, last), (written_first, written_last) = _span(t), _span(written)
    if not (last < written_first or written_last < first):
        raise ValueError(
            f"{op}: expected {name} in memory of its own, got one that overlaps {written_name}; "
            "clone it"
        )


def _span(t: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """Where the first and the last element stand in the storage."""
    length = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.storage_offset(), t.storage_offset() + length


def _num_basis(op: str, name: str, num_basis: int) -> None:
    if num_basis < 1:
        raise ValueError(f"{op}: expected {name} with at least one basis point (K >= 1), got K = 0")


def _basis(op: str, basis: Tensor, like_name: str, like: Tensor) -> None:
    _like(op, "basis", basis, like_name, like)
    _rank(op, "basis", basis, 3, "[K, O, I]")
    _num_basis(op, "basis", basis.shape[0])


def _coeff(op: str, coeff: Tensor, like_name: str, like: Tensor) -> None:
    _accumulation_like(op, "coeff", coeff, like_name, like)
    _rank(op, "coeff", coeff, 2, "[B, K]")


def _index(op: str, index: Tensor, coeff: Tensor, num_basis: int) -> None:
    if index.dtype != torch.int64:
        raise TypeError(
            f"{op}: expected index of dtype int64, got {_name(index.dtype)}; "
            "convert it with .long()"
        )
    _device_like(op, "index", index, "coeff", coeff)
    _same_shape(op, "index", index, "[B]", [coeff.shape[0]])
    if not 1 <= coeff.shape[1] <= num_basis:
        raise ValueError(
            f"{op}: expected coeff with 1 <= L <= K = {num_basis} coefficients a sample, "
            f"got L = {coeff.shape[1]}"
        )


def _condition(
    op: str, batch: int, num_basis: int, coeff: Tensor, index: Tensor | None = None
) -> None:
    if index is None:
        _same_shape(op, "coeff", coeff, "[B, K]", [batch, num_basis])
    else:
        _same_shape(op, "coeff", coeff, "[B, L]", [batch, coeff.shape[1]])
        _index(op, index, coeff, num_basis)


def _bias(op: str, bias: Tensor | None, basis: Tensor, like_name: str, like: Tensor) -> None:
    if bias is not None:
        _like(op, "bias", bias, like_name, like)
        _same_shape(op, "bias", bias, "[K, O]", basis.shape[:2])


def _forward(
    op: str,
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    index: Tensor | None = None,
) -> None:
    _floating(op, "input", input)
    _rank(op, "input", input, 2, "[B, ..., I]", exact=False)
    _basis(op, basis, "input", input)
    _coeff(op, coeff, "input", input)
    K, _, I = basis.shape
    B = input.shape[0]
    _same_shape(op, "input", input, "[B, ..., I]", [B, -1, I])
    _condition(op, B, K, coeff, index)
    _bias(op, bias, basis, "input", input)


def _backward(
    op: str,
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    index: Tensor | None = None,
) -> None:
    _floating(op, "grad_output", grad_output)
    _rank(op, "grad_output", grad_output, 2, "[B, ..., O]", exact=False)
    _like(op, "input", input, "grad_output", grad_output)
    _basis(op, basis, "grad_output", grad_output)
    _coeff(op, coeff, "grad_output", grad_output)
    K, O, I = basis.shape
    B = grad_output.shape[0]
    _same_shape(op, "grad_output", grad_output, "[B, ..., O]", [B, -1, O])
    _same_shape(op, "input", input, "[B, ..., I]", [*grad_output.shape[:-1], I])
    _condition(op, B, K, coeff, index)
    _bias(op, bias, basis, "grad_output", grad_output)


def manifold_linear(input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None) -> None:
    _forward("manifold_linear", input, basis, coeff, bias)


def manifold_linear_local(
    input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor, bias: Tensor | None
) -> None:
    _forward("manifold_linear_local", input, basis, coeff, bias, index)


def manifold_linear_backward(
    grad_output: Tensor, input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None
) -> None:
    _backward("manifold_linear_backward", grad_output, input, basis, coeff, bias)


def manifold_linear_local_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    index: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
) -> None:
    op = "manifold_linear_local_backward"
    _backward(op, grad_output, input, basis, coeff, bias, index)


def manifold_linear_grad_input(grad_output: Tensor, basis: Tensor, coeff: Tensor) -> None:
    op = "manifold_linear_grad_input"
    _floating(op, "grad_output", grad_output)
    _rank(op, "grad_output", grad_output, 2, "[B, ..., O]", exact=False)
    _basis(op, basis, "grad_output", grad_output)
    _coeff(op, coeff, "grad_output", grad_output)
    K, O, _ = basis.shape
    B = grad_output.shape[0]
    _same_shape(op, "grad_output", grad_output, "[B, ..., O]", [B, -1, O])
    _condition(op, B, K, coeff)


def _outer(op: str, grad_output: Tensor, input: Tensor, coeff: Tensor) -> None:
    _floating(op, "grad_output", grad_output)
    _rank(op, "grad_output", grad_output, 2, "[B, ..., O]", exact=False)
    _like(op, "input", input, "grad_output", grad_output)
    _coeff(op, coeff, "grad_output", grad_output)
    B, K = grad_output.shape[0], coeff.shape[1]
    in_features = input.shape[-1] if input.dim() > 0 else 0
    _same_shape(op, "input", input, "[B, ..., I]", [*grad_output.shape[:-1], in_features])
    _condition(op, B, K, coeff)
    _num_basis(op, "coeff", K)


def manifold_linear_grad_basis(grad_output: Tensor, input: Tensor, coeff: Tensor) -> None:
    _outer("manifold_linear_grad_basis", grad_output, input, coeff)


def manifold_linear_update_(
    basis: Tensor, grad_output: Tensor, input: Tensor, coeff: Tensor
) -> None:
    op = "manifold_linear_update_"
    _outer(op, grad_output, input, coeff)
    _moved_basis(op, basis, grad_output, input, coeff)


def _moved_basis(op: str, basis: Tensor, grad_output: Tensor, input: Tensor, coeff: Tensor) -> None:
    _like(op, "basis", basis, "grad_output", grad_output)
    want = [coeff.shape[1], grad_output.shape[-1], input.shape[-1]]
    _same_shape(op, "basis", basis, "[K, O, I]", want)


def manifold_linear_grad_coeff(grad_output: Tensor, input: Tensor, basis: Tensor) -> None:
    op = "manifold_linear_grad_coeff"
    _floating(op, "grad_output", grad_output)
    _rank(op, "grad_output", grad_output, 2, "[B, ..., O]", exact=False)
    _like(op, "input", input, "grad_output", grad_output)
    _basis(op, basis, "grad_output", grad_output)
    _, O, I = basis.shape
    B = grad_output.shape[0]
    _same_shape(op, "grad_output", grad_output, "[B, ..., O]", [B, -1, O])
    _same_shape(op, "input", input, "[B, ..., I]", [*grad_output.shape[:-1], I])


def interpolate_weights(basis: Tensor, coeff: Tensor) -> None:
    op = "interpolate_weights"
    _floating(op, "basis", basis)
    _rank(op, "basis", basis, 1, "[K, ...]", exact=False)
    _num_basis(op, "basis", basis.shape[0])
    _accumulation_like(op, "coeff", coeff, "basis", basis)
    _rank(op, "coeff", coeff, 2, "[B, K]")
    _same_shape(op, "coeff", coeff, "[B, K]", [coeff.shape[0], basis.shape[0]])


def interpolate_weights_grad_basis(grad_output: Tensor, coeff: Tensor) -> None:
    op = "interpolate_weights_grad_basis"
    _floating(op, "grad_output", grad_output)
    _rank(op, "grad_output", grad_output, 1, "[B, ...]", exact=False)
    _accumulation_like(op, "coeff", coeff, "grad_output", grad_output)
    _rank(op, "coeff", coeff, 2, "[B, K]")
    _same_shape(op, "coeff", coeff, "[B, K]", [grad_output.shape[0], coeff.shape[1]])


def interpolate_weights_grad_coeff(grad_output: Tensor, basis: Tensor) -> None:
    _interpolate_gradients("interpolate_weights_grad_coeff", grad_output, basis)


def interpolate_weights_backward(grad_output: Tensor, basis: Tensor, coeff: Tensor) -> None:
    op = "interpolate_weights_backward"
    _interpolate_gradients(op, grad_output, basis)
    _accumulation_like(op, "coeff", coeff, "grad_output", grad_output)
    _same_shape(op, "coeff", coeff, "[B, K]", [grad_output.shape[0], basis.shape[0]])


def _interpolate_gradients(op: str, grad_output: Tensor, basis: Tensor) -> None:
    _floating(op, "grad_output", grad_output)
    _rank(op, "grad_output", grad_output, 1, "[B, ...]", exact=False)
    _like(op, "basis", basis, "grad_output", grad_output)
    _rank(op, "basis", basis, 1, "[K, ...]", exact=False)
    _same_shape(op, "basis", basis, "[K, ...]", [basis.shape[0], *grad_output.shape[1:]])


def manifold_metric(coeff: Tensor, weight: Tensor | None) -> None:
    op = "manifold_metric"
    if coeff.dtype not in (torch.float64, torch.float32):
        raise TypeError(
            f"{op}: expected coeff of dtype float64 or float32, got {_name(coeff.dtype)}; "
            "convert it with .float()"
        )
    _rank(op, "coeff", coeff, 2, "[N, K]")
    if weight is not None:
        _like(op, "weight", weight, "coeff", coeff)
        _same_shape(op, "weight", weight, "[N]", [coeff.shape[0]])
    elif coeff.shape[0] < 1:
        raise ValueError(f"{op}: expected coeff of at least one condition (N >= 1), got N = 0")


def natural_gradient(
    input: Tensor, grad_output: Tensor, coeff: Tensor, metric_inverse: Tensor
) -> None:
    op = "natural_gradient"
    _outer(op, grad_output, input, coeff)
    _metric_inverse(op, coeff, metric_inverse)


def _metric_inverse(op: str, coeff: Tensor, metric_inverse: Tensor) -> None:
    _like(op, "metric_inverse", metric_inverse, "coeff", coeff)
    K = coeff.shape[1]
    _same_shape(op, "metric_inverse", metric_inverse, "[K, K]", [K, K])


def natural_step_(
    basis: Tensor,
    input: Tensor,
    grad_output: Tensor,
    coeff: Tensor,
    metric_inverse: Tensor,
    lr: float,
) -> None:
    op = "natural_step_"
    _outer(op, grad_output, input, coeff)
    _moved_basis(op, basis, grad_output, input, coeff)
    _metric_inverse(op, coeff, metric_inverse)
    if not math.isfinite(lr):
        raise ValueError(f"{op}: expected lr to be finite, got {lr}")
