"""Every op in a few lines of PyTorch: the oracle of the kernels, and what runs where none is built.

The multilinear ops are einsums over named operands. A :class:`Form` holds the operands'
subscripts; leaving one operand out and summing over the rest gives one op of the form, and the
derivative of each such op is made of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromod_ext import _checks
from neuromod_ext._checks import accumulation_dtype


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
    if bias is not None:  # one more input, always 1: the bias is added before c is applied
        input = torch.cat((input, input.new_ones(*input.shape[:-1], 1)), -1)
        basis = torch.cat((basis, bias.unsqueeze(-1)), -1)
    return MANIFOLD_LINEAR.contract("output", (input, basis, coeff), (False,) * 3)


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


def interpolate_weights(basis: Tensor, coeff: Tensor) -> Tensor:
    """W[b] = Σ_k c[b,k] P[k]."""
    _checks.interpolate_weights(basis, coeff)
    return INTERPOLATE_WEIGHTS.contract("output", (basis, coeff), (False, False))


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
    _checks.manifold_step_(
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
