"""The compiled ops: loading the extension, explaining a failure, and the ops' fakes.

``EXTENSION`` says whether the kernels are there. Where they are not (no compiler, another torch),
everything runs on :mod:`neuromod_ext.reference`, slower but the same; ``LOAD_ERROR`` says why.
``NEUROMOD_REFERENCE=1`` in the environment asks for the reference.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuromod_ext import (
    _checks,
    _conv_checks,
    _fly_checks,
    _hadamard_checks,
    _step_checks,
    reference,
)
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext._conv_checks import Options
from neuromod_ext.reference import Gradients

NAMES = (
    "manifold_linear",
    "manifold_linear_backward",
    "manifold_linear_grad_input",
    "manifold_linear_grad_basis",
    "manifold_linear_grad_coeff",
    "manifold_linear_update_",
    "manifold_linear_local",
    "manifold_linear_local_backward",
    "manifold_conv",
    "manifold_conv_backward",
    "interpolate_weights",
    "interpolate_weights_backward",
    "interpolate_weights_grad_basis",
    "interpolate_weights_grad_coeff",
    "manifold_metric",
    "manifold_step_",
    "manifold_step_foreach_",
    "fly_hash",
    "fly_hash_backward",
    "fly_readout",
    "fly_readout_backward",
    "hadamard_rotate",
    "hadamard_rotate_",
)


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _built_against(binary: Path) -> str:
    """The torch version a binary was built against, read from its text without loading it."""
    match = re.search(rb"neuromod_ext built against torch ([^\0]+)", binary.read_bytes())
    return match.group(1).decode() if match else "unknown"


def _load() -> str | None:
    """Load the kernels; what stood in the way, or None."""
    if os.environ.get("NEUROMOD_REFERENCE") == "1":
        return "NEUROMOD_REFERENCE=1 asks for the reference"
    spec = importlib.util.find_spec("neuromod_ext._C")
    if spec is None or spec.origin is None:
        return (
            "neuromod_ext._C is not built for this interpreter; run `make`, or `pip install "
            "--no-build-isolation .` in the source tree"
        )
    built = _built_against(Path(spec.origin))
    if _release(built) != _release(torch.__version__):
        return (
            f"neuromod_ext._C was built against torch {built}, but torch {torch.__version__} is "
            "running; rebuild it"
        )
    try:
        from neuromod_ext import _C  # noqa: F401  (loading it registers the ops)
    except ImportError as error:
        return (
            f"neuromod_ext._C, built against torch {built}, does not load under torch "
            f"{torch.__version__}: {error}; rebuild it"
        )
    return None


LOAD_ERROR = _load()
EXTENSION = LOAD_ERROR is None
if not EXTENSION and os.environ.get("NEUROMOD_REFERENCE") != "1":
    warnings.warn(
        f"neuromod_ext: the compiled kernels are missing, so the slower reference runs: "
        f"{LOAD_ERROR}",
        RuntimeWarning,
        stacklevel=2,
    )

TORCH_PRODUCT_OUTRUNS_TILES = True
"""Whether torch's products of float32 and float64 are faster than tiles, as MKL's with AVX-512."""

if EXTENSION:
    from neuromod_ext import _C

    TORCH_PRODUCT_OUTRUNS_TILES = _C.torch_product_outruns_tiles()
    OPS: dict[str, Callable[..., Any]] = {
        name: getattr(torch.ops.neuromod_ext, name).default for name in NAMES
    }
else:
    OPS = {name: getattr(reference, name) for name in NAMES}


def _fake_manifold_linear(
    input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None
) -> Tensor:
    _checks.manifold_linear(input, basis, coeff, bias)
    return input.new_empty(*input.shape[:-1], basis.shape[1])


def _fake_manifold_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> Gradients:
    _checks.manifold_linear_backward(grad_output, input, basis, coeff, bias)
    return _fake_gradients(grad_output, input, basis, coeff, needed)


def _fake_gradients(
    grad_output: Tensor, input: Tensor, basis: Tensor, coeff: Tensor, needed: Sequence[bool]
) -> Gradients:
    new = grad_output.new_empty
    return (
        new(input.shape) if needed[0] else new(0),
        new(basis.shape) if needed[1] else new(0),
        new(coeff.shape, dtype=coeff.dtype) if needed[2] else new(0),
        new(basis.shape[:2]) if needed[3] else new(0),
    )


def _fake_manifold_linear_grad_input(grad_output: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    _checks.manifold_linear_grad_input(grad_output, basis, coeff)
    return grad_output.new_empty(*grad_output.shape[:-1], basis.shape[2])


def _fake_manifold_linear_grad_basis(grad_output: Tensor, input: Tensor, coeff: Tensor) -> Tensor:
    _checks.manifold_linear_grad_basis(grad_output, input, coeff)
    return grad_output.new_empty(coeff.shape[1], grad_output.shape[-1], input.shape[-1])


def _fake_manifold_linear_grad_coeff(grad_output: Tensor, input: Tensor, basis: Tensor) -> Tensor:
    _checks.manifold_linear_grad_coeff(grad_output, input, basis)
    dtype = accumulation_dtype(grad_output.dtype)
    return grad_output.new_empty(grad_output.shape[0], basis.shape[0], dtype=dtype)


def _fake_manifold_linear_update_(
    basis: Tensor, grad_output: Tensor, input: Tensor, coeff: Tensor
) -> None:
    _checks.manifold_linear_update_(basis, grad_output, input, coeff)


def _fake_manifold_linear_local(
    input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor, bias: Tensor | None = None
) -> Tensor:
    _checks.manifold_linear_local(input, basis, index, coeff, bias)
    return input.new_empty(*input.shape[:-1], basis.shape[1])


def _fake_manifold_linear_local_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    index: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> Gradients:
    _checks.manifold_linear_local_backward(grad_output, input, basis, index, coeff, bias)
    return _fake_gradients(grad_output, input, basis, coeff, needed)


def _fake_manifold_conv(
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    options = Options(stride, padding, dilation, groups)
    return input.new_empty(_conv_checks.forward(input, basis, coeff, bias, options))


def _fake_manifold_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needed: Sequence[bool],
) -> Gradients:
    options = Options(stride, padding, dilation, groups)
    _conv_checks.backward(grad_output, input, basis, coeff, bias, options)
    return _fake_gradients(grad_output, input, basis, coeff, needed)


def _fake_interpolate_weights(basis: Tensor, coeff: Tensor) -> Tensor:
    _checks.interpolate_weights(basis, coeff)
    return basis.new_empty(coeff.shape[0], *basis.shape[1:])


def _fake_interpolate_weights_backward(
    grad_output: Tensor, basis: Tensor, coeff: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    _checks.interpolate_weights_backward(grad_output, basis, coeff)
    new = basis.new_empty
    return (
        new(basis.shape) if needed[0] else new(0),
        new(coeff.shape, dtype=coeff.dtype) if needed[1] else new(0),
    )


def _fake_interpolate_weights_grad_basis(grad_output: Tensor, coeff: Tensor) -> Tensor:
    _checks.interpolate_weights_grad_basis(grad_output, coeff)
    return grad_output.new_empty(coeff.shape[1], *grad_output.shape[1:])


def _fake_interpolate_weights_grad_coeff(grad_output: Tensor, basis: Tensor) -> Tensor:
    _checks.interpolate_weights_grad_coeff(grad_output, basis)
    dtype = accumulation_dtype(basis.dtype)
    return basis.new_empty(grad_output.shape[0], basis.shape[0], dtype=dtype)


def _fake_manifold_metric(coeff: Tensor, weight: Tensor | None = None) -> Tensor:
    _checks.manifold_metric(coeff, weight)
    return coeff.new_empty(coeff.shape[1], coeff.shape[1])


def _fake_manifold_step_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    metric_inverse: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
) -> None:
    _step_checks.manifold_step_(
        param,
        grad,
        momentum_buffer,
        metric_inverse,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
    )


def _fake_manifold_step_foreach_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    metric_inverses: Sequence[Tensor | None],
    lr: Tensor,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
) -> None:
    _step_checks.manifold_step_foreach_(
        params,
        grads,
        momentum_buffers,
        metric_inverses,
        lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
    )


def _fake_fly_hash(input: Tensor, index: Tensor) -> Tensor:
    _fly_checks.fly_hash(input, index)
    return input.new_empty(input.shape[0], index.shape[0])


def _fake_fly_hash_backward(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    _fly_checks.fly_hash_backward(grad_output, input, index)
    return input.new_empty(input.shape)


def _fake_fly_readout(
    input: Tensor, index: Tensor, gain: Tensor, readout: Tensor, task: Tensor | None = None
) -> Tensor:
    _fly_checks.fly_readout(input, index, gain, readout, task)
    return input.new_empty(input.shape[0], readout.shape[0])


def _fake_fly_readout_backward(
    grad_output: Tensor,
    input: Tensor,
    index: Tensor,
    gain: Tensor,
    readout: Tensor,
    task: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _fly_checks.fly_readout_backward(grad_output, input, index, gain, readout, task)
    new = input.new_empty
    return (
        new(input.shape) if needed[0] else new(0),
        new(gain.shape) if needed[1] else new(0),
        new(readout.shape) if needed[2] else new(0),
    )


def _fake_hadamard_rotate(weights: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    _hadamard_checks.hadamard_rotate(weights, signs)
    return weights.new_empty(weights.shape)


def _fake_hadamard_rotate_(weights: Sequence[Tensor], signs: Tensor, inverse: bool = False) -> None:
    _hadamard_checks.hadamard_rotate_(weights, signs)


if EXTENSION:
    for _op in NAMES:
        torch.library.register_fake(f"neuromod_ext::{_op}", globals()[f"_fake_{_op}"])
