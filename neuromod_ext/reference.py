"""Every op in a few lines of PyTorch: the oracle of the kernels, and what runs where none is built.

The multilinear ops are einsums over named operands. A :class:`Form` holds the operands'
subscripts; leaving one operand out and summing over the rest gives one op of the form, and the
derivative of each such op is made of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext import _checks, _conv_checks, _step_checks
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext._conv_checks import Options
from neuromod_ext._fly_reference import (
    fly_hash,
    fly_hash_backward,
    fly_readout,
    fly_readout_backward,
)
from neuromod_ext._hadamard_reference import hadamard_rotate, hadamard_rotate_

__all__ = [  # re-exported
    "fly_hash",
    "fly_hash_backward",
    "fly_readout",
    "fly_readout_backward",
    "hadamard_rotate",
    "hadamard_rotate_",
]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of input, basis, coeff and bias


@dataclass(frozen=True)
class Form:
    """A multilinear form: the subscripts of each operand, and the op that yields each one.

    ``ops`` maps an operand to the name of the op that contracts the others, and to their order in
    its signature. The operand ``coeff`` has the accumulation dtype, all others share one dtype.
    Subscript ``t`` stands for any number of dimensions.
    """

    subscripts: dict[str, str]
    ops: dict[str, tuple[str, tuple[str, ...]]]

    def operands(self, result: str) -> tuple[str, ...]:
        """The operands, in order, of the op that yields ``result``."""
        return self.ops[result][1]

    def contract(self, result: str, values: Sequence[Tensor], batched: Sequence[bool]) -> Tensor:
        """Yield ``result`` by einsum; ``batched`` operands (and then the result) lead with a batch.

        Sums run in the accumulation dtype, in the kernels' order: Inf and NaN spread alike.
        """
        names = self.operands(result)
        dtype = next(v.dtype for n, v in zip(names, values, strict=True) if n != "coeff")
        middle: Sequence[int] = ()
        factors = {}
        for name, value, batch in zip(names, values, batched, strict=True):
            letters = ("z" if batch else "") + self.subscripts[name]
            if "t" in letters:
                start = letters.index("t")
                stop = value.dim() - (len(letters) - start - 1)
                middle = value.shape[start:stop]
                value = value.reshape(*value.shape[:start], _product(middle), *value.shape[stop:])
            factors[name] = letters, value.to(accumulation_dtype(dtype))
        letters = ("z" if any(batched) else "") + self.subscripts[result]
        order = sorted(names, key=lambda name: name == "input" and names[0] != name)
        terms, out = factors[order[0]]
        for i, name in enumerate(order[1:], 2):
            term, factor = factors[name]
            needed = letters + "".join(factors[later][0] for later in order[i:])
            kept = "".join(c for c in dict.fromkeys(terms + term) if c in needed)
            kept = letters if i == len(order) else kept
            out, terms = torch.einsum(f"{terms},{term}->{kept}", out, factor), kept
        if "t" in letters:
            start = letters.index("t")
            out = out.reshape(*out.shape[:start], *middle, *out.shape[start + 1 :])
        return out if result == "coeff" else out.to(dtype)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total = total * size
    return total


MANIFOLD_LINEAR = Form(
    {"input": "bti", "basis": "koi", "coeff": "bk", "output": "bto"},
    {
        "output": ("manifold_linear", ("input", "basis", "coeff")),
        "input": ("manifold_linear_grad_input", ("output", "basis", "coeff")),
        "basis": ("manifold_linear_grad_basis", ("output", "input", "coeff")),
        "coeff": ("manifold_linear_grad_coeff", ("output", "input", "basis")),
    },
)
INTERPOLATE_WEIGHTS = Form(
    {"basis": "kt", "coeff": "bk", "output": "bt"},
    {
        "output": ("interpolate_weights", ("basis", "coeff")),
        "basis": ("interpolate_weights_grad_basis", ("output", "coeff")),
        "coeff": ("interpolate_weights_grad_coeff", ("output", "basis")),
    },
)


def manifold_linear(
    input: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y[b,t] = Σ_k c[b,k] (P[k] x[b,t] + β[k])."""
    _checks.manifold_linear(input, basis, coeff, bias)
    input, basis = _with_bias(input, basis, bias)
    return MANIFOLD_LINEAR.contract("output", (input, basis, coeff), (False,) * 3)


def _with_bias(input: Tensor, basis: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The bias as one more input that is always 1, so that it is added before c is applied."""
    if bias is None:
        return input, basis
    ones = input.new_ones(*input.shape[:-1], 1)
    return torch.cat((input, ones), -1), torch.cat((basis, bias.unsqueeze(-1)), -1)


def manifold_linear_grad_input(grad_output: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """dx[b,t] = Σ_k c[b,k] P[k]ᵀ g[b,t]."""
    _checks.manifold_linear_grad_input(grad_output, basis, coeff)
    return MANIFOLD_LINEAR.contract("input", (grad_output, basis, coeff), (False,) * 3)


def manifold_linear_grad_basis(grad_output: Tensor, input: Tensor, coeff: Tensor) -> Tensor:
    """dP[k] = Σ_bt c[b,k] g[b,t] x[b,t]ᵀ."""
    _checks.manifold_linear_grad_basis(grad_output, input, coeff)
    return MANIFOLD_LINEAR.contract("basis", (grad_output, input, coeff), (False,) * 3)


def manifold_linear_grad_coeff(grad_output: Tensor, input: Tensor, basis: Tensor) -> Tensor:
    """dc[b,k] = Σ_t g[b,t]ᵀ P[k] x[b,t]."""
    _checks.manifold_linear_grad_coeff(grad_output, input, basis)
    return MANIFOLD_LINEAR.contract("coeff", (grad_output, input, basis), (False,) * 3)


def manifold_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> Gradients:
    """The gradients of :func:`manifold_linear`; of one that is not needed, an empty tensor."""
    _checks.manifold_linear_backward(grad_output, input, basis, coeff, bias)
    empty = grad_output.new_empty(0)
    grad_input = grad_basis = grad_coeff = grad_bias = empty
    if needed[0]:
        grad_input = manifold_linear_grad_input(grad_output, basis, coeff)
    input, basis = _with_bias(input, basis, bias)
    if needed[2]:
        grad_coeff = manifold_linear_grad_coeff(grad_output, input, basis)
    if needed[1] or needed[3]:
        if bias is None:
            input, _ = _with_bias(input, basis, basis.new_zeros(basis.shape[:2]))
        both = manifold_linear_grad_basis(grad_output, input, coeff)
        grad_basis = both[..., :-1].contiguous() if needed[1] else empty
        grad_bias = both[..., -1].contiguous() if needed[3] else empty
    return grad_input, grad_basis, grad_coeff, grad_bias


def manifold_linear_update_(
    basis: Tensor, grad_output: Tensor, input: Tensor, coeff: Tensor
) -> None:
    """P[k] += Σ_bt c[b,k] g[b,t] x[b,t]ᵀ, in place."""
    op = "manifold_linear_update_"
    _checks.manifold_linear_update_(basis, grad_output, input, coeff)
    read: dict[str, Tensor | None] = {"grad_output": grad_output, "input": input, "coeff": coeff}
    _checks.written_memory(op, read, basis=basis)
    wide = accumulation_dtype(basis.dtype)
    move = manifold_linear_grad_basis(grad_output.to(wide), input.to(wide), coeff)
    basis.copy_(basis.to(wide) + move)


def positions(index: Tensor, num_local: int, num_basis: int) -> Tensor:
    """The basis points that consecutive coefficients belong to, [B, L]: (index[b] + l) mod K."""
    step = torch.arange(num_local, device=index.device)
    return (index.remainder(num_basis).unsqueeze(-1) + step).remainder(num_basis)


def densified(index: Tensor, coeff: Tensor, num_basis: int) -> Tensor:
    """All K coefficients of each sample, of which those that are not given are 0."""
    dense = coeff.new_zeros(*coeff.shape[:-1], num_basis)
    return dense.scatter(-1, positions(index, coeff.shape[-1], num_basis), coeff)


def manifold_linear_local(
    input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y[b,t] = Σ_l c[b,l] (P[k] x[b,t] + β[k]), k = (index[b] + l) mod K."""
    _checks.manifold_linear_local(input, basis, index, coeff, bias)
    return manifold_linear(input, basis, densified(index, coeff, basis.shape[0]), bias)


def manifold_linear_local_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    index: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> Gradients:
    """The gradients of :func:`manifold_linear_local`."""
    _checks.manifold_linear_local_backward(grad_output, input, basis, index, coeff, bias)
    K = basis.shape[0]
    dense = densified(index, coeff, K)
    grads = manifold_linear_backward(grad_output, input, basis, dense, bias, needed)
    if not needed[2]:
        return grads
    grad_coeff = grads[2].gather(-1, positions(index, coeff.shape[-1], K))
    return grads[0], grads[1], grad_coeff, grads[3]


def manifold_conv(
    input: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """y[b] = Σ_k c[b,k] (P[k] * x[b] + β[k]): each tap's product with the pixels that it meets."""
    options = Options(stride, padding, dilation, groups)
    shape = _conv_checks.forward(input, basis, coeff, bias, options)
    wide = accumulation_dtype(input.dtype)
    weight = torch.tensordot(coeff, basis.to(wide), 1)  # [B, O, C / groups, taps ...]
    weight = weight.unflatten(1, (groups, shape[1] // groups))
    around = [p for p in reversed(padding) for _ in range(2)]
    pixels = F.pad(input.to(wide), around).unflatten(1, (groups, basis.shape[2]))
    out = pixels.new_zeros(shape[0], groups, shape[1] // groups, _product(shape[2:]))
    for tap in itertools.product(*(range(k) for k in basis.shape[3:])):
        walk = zip(tap, shape[2:], stride, dilation, strict=True)
        met = [slice(t * d, t * d + (n - 1) * s + 1, s) for t, n, s, d in walk]
        seen = pixels[(..., *met)].flatten(3)
        out = out + torch.einsum("bgoc,bgcn->bgon", weight[(..., *tap)], seen)
    if bias is not None:
        blend = torch.matmul(coeff, bias.to(wide))
        out = out + blend.unflatten(1, (groups, shape[1] // groups)).unsqueeze(-1)
    result: Tensor = out.reshape(shape).to(input.dtype)
    return result


def manifold_conv_backward(
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
    """The gradients of :func:`manifold_conv`, by autograd; of one not needed, an empty tensor."""
    options = Options(stride, padding, dilation, groups)
    _conv_checks.backward(grad_output, input, basis, coeff, bias, options)
    bias = basis.new_zeros(basis.shape[:2]) if bias is None else bias
    with torch.enable_grad():
        x, P, c, beta = (t.detach().requires_grad_() for t in (input, basis, coeff, bias))
        out = manifold_conv(x, P, c, beta, *options)
    grads = torch.autograd.grad(out, (x, P, c, beta), grad_output)
    empty = grad_output.new_empty(0)
    results = (g.contiguous() if need else empty for g, need in zip(grads, needed, strict=True))
    input_grad, basis_grad, coeff_grad, bias_grad = results
    return input_grad, basis_grad, coeff_grad, bias_grad


def interpolate_weights(basis: Tensor, coeff: Tensor) -> Tensor:
    """W[b] = Σ_k c[b,k] P[k]."""
    _checks.interpolate_weights(basis, coeff)
    return INTERPOLATE_WEIGHTS.contract("output", (basis, coeff), (False, False))


def interpolate_weights_backward(
    grad_output: Tensor, basis: Tensor, coeff: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Both gradients of :func:`interpolate_weights`; of one that is not needed, an empty tensor."""
    _checks.interpolate_weights_backward(grad_output, basis, coeff)
    empty = basis.new_empty(0)
    return (
        interpolate_weights_grad_basis(grad_output, coeff) if needed[0] else empty,
        interpolate_weights_grad_coeff(grad_output, basis) if needed[1] else empty,
    )


def interpolate_weights_grad_basis(grad_output: Tensor, coeff: Tensor) -> Tensor:
    """dP[k] = Σ_b c[b,k] g[b]."""
    _checks.interpolate_weights_grad_basis(grad_output, coeff)
    return INTERPOLATE_WEIGHTS.contract("basis", (grad_output, coeff), (False, False))


def interpolate_weights_grad_coeff(grad_output: Tensor, basis: Tensor) -> Tensor:
    """dc[b,k] = ⟨g[b], P[k]⟩."""
    _checks.interpolate_weights_grad_coeff(grad_output, basis)
    return INTERPOLATE_WEIGHTS.contract("coeff", (grad_output, basis), (False, False))


def manifold_metric(coeff: Tensor, weight: Tensor | None = None) -> Tensor:
    """G = Σ_n w[n] c[n] c[n]ᵀ, with w = 1/N where none is given."""
    _checks.manifold_metric(coeff, weight)
    return weighted_gram(coeff, weight)


def weighted_gram(coeff: Tensor, weight: Tensor | None) -> Tensor:
    """:func:`manifold_metric` with any batch dimensions in front."""
    wide = coeff.double()
    scaled = wide / coeff.shape[-2] if weight is None else wide * weight.unsqueeze(-1)
    return torch.matmul(wide.mT, scaled).to(coeff.dtype)


def manifold_step_(
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
    """SGD in the manifold's metric, in place: d = G⁻¹ g + weight_decay P, momentum, P -= lr d."""
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
    read = {"grad": grad, "metric_inverse": metric_inverse}
    _checks.written_memory("manifold_step_", read, param=param, momentum_buffer=momentum_buffer)
    operands = (param, grad, momentum_buffer, metric_inverse)
    _step(*operands, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step)


def manifold_step_foreach_(
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
    """:func:`manifold_step_` of many parameters, by a rate in a tensor."""
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
    read = {f"grads[{i}]": t for i, t in enumerate(grads)}
    read |= {f"metric_inverses[{i}]": t for i, t in enumerate(metric_inverses) if t is not None}
    written = {f"params[{i}]": t for i, t in enumerate(params)}
    written |= {f"momentum_buffers[{i}]": t for i, t in enumerate(momentum_buffers)}
    _checks.written_memory("manifold_step_foreach_", {**read}, **written)
    for i, param in enumerate(params):
        buffer = momentum_buffers[i] if len(momentum_buffers) > 0 else None
        operands = (param, grads[i], buffer, metric_inverses[i])
        _step(*operands, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step)


def _step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    metric_inverse: Tensor | None,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
) -> None:
    wide = accumulation_dtype(param.dtype)
    d = grad.to(wide)
    if metric_inverse is not None:
        d = torch.tensordot(metric_inverse, d, 1)
    d = (-d if maximize else d) + weight_decay * param.to(wide)
    if momentum_buffer is not None:
        m = d if first_step else momentum * momentum_buffer.to(wide) + (1 - dampening) * d
        momentum_buffer.copy_(m)
        d = d + momentum * m if nesterov else m
    param.copy_(param.to(wide) - lr * d)
