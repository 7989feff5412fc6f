"""Public functions and modules as functions of tensors, each with its definition in plain torch.

The definitions form every sample's weight and apply torch's own layer to it; they know nothing of
the library, and are differentiable to any order, so they are the oracle of every transform.
"""

from collections.abc import Callable
from typing import Any

import fly_compositions
import pytest
import torch
from composition import Composition
from sampling import Draw
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import neuromod_ext as nm
import neuromod_ext.functional as MF


def blend(coeff: Tensor, basis: Tensor) -> Tensor:
    """W[b] = sum_k c[b,k] P[k], in the wider of both dtypes."""
    basis = basis.to(coeff.dtype)
    return sum(
        coeff[..., k].reshape(*coeff.shape[:-1], *(1,) * (basis.dim() - 1)) * basis[k]
        for k in range(basis.shape[0])
    )


def linear(x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None) -> Tensor:
    if coeff.dim() == 1:
        return F.linear(x, blend(coeff, basis), None if bias is None else blend(coeff, bias))
    rows = x.unsqueeze(-2) if x.dim() == 2 else x
    y = torch.matmul(rows, blend(coeff, basis).mT)
    if bias is not None:
        y = y + blend(coeff, bias).unsqueeze(-2)
    return y.squeeze(-2) if x.dim() == 2 else y


def local_index(coeff: Tensor) -> Tensor:
    """Where each sample's coefficients begin: before the first basis point, and on."""
    return 2 * torch.arange(coeff.shape[0], device=coeff.device) - 3


def local_linear(x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None) -> Tensor:
    """The coefficients that are not given are 0."""
    K = basis.shape[0]
    at = (local_index(coeff)[:, None] + torch.arange(coeff.shape[1], device=coeff.device)) % K
    columns = [(coeff * (at == k)).sum(1) for k in range(K)]
    return linear(x, basis, torch.stack(columns, 1), bias)


def conv(dims: int, **options: Any) -> Callable[..., Tensor]:
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def definition(x, basis, coeff, bias=None):
        weight, shift = blend(coeff, basis), None if bias is None else blend(coeff, bias)
        if coeff.dim() == 1:
            return function(x, weight, shift, **options)
        samples = [
            function(x[b : b + 1], weight[b], None if shift is None else shift[b], **options)
            for b in range(x.shape[0])
        ]
        return torch.cat(samples)

    return definition


def metric(coeff: Tensor, weight: Tensor | None = None) -> Tensor:
    if weight is None:
        return coeff.mT @ coeff / coeff.shape[-2]
    return coeff.mT @ (weight.unsqueeze(-1) * coeff)


def natural(x: Tensor, g: Tensor, coeff: Tensor, inverse: Tensor) -> Tensor:
    each = g.unsqueeze(-1) * x.unsqueeze(-2)  # [B, O, I]
    return torch.einsum("jk,bk,boi->joi", inverse, coeff, each)


# Arguments: small, prime, and different for each role


def linear_args(tokens: tuple[int, ...] = (), bias: bool = True, one: bool = False):
    def make(d: Draw, B: int) -> tuple[Tensor, ...]:
        K, O, I = d.pick(1, 2, 3), d.pick(2, 3), d.pick(2, 3)
        args = [d.tensor(B, *tokens, I), d.tensor(K, O, I), d.coeff(*(() if one else (B,)), K)]
        return (*args, d.tensor(K, O)) if bias else tuple(args)

    return make


def local_args(tokens: tuple[int, ...] = (), bias: bool = True):
    def make(d: Draw, B: int) -> tuple[Tensor, ...]:
        K, O, I = d.pick(2, 3, 4), d.pick(2, 3), d.pick(2, 3)
        L = d.random.randint(1, K)
        args = [d.tensor(B, *tokens, I), d.tensor(K, O, I), d.coeff(B, L)]
        return (*args, d.tensor(K, O)) if bias else tuple(args)

    return make


def local_call(x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None) -> Tensor:
    return MF.manifold_linear_local(x, basis, local_index(coeff), coeff, bias)


def conv_args(dims: int, groups: int = 1, bias: bool = True, one: bool = False, out: int = 2):
    def make(d: Draw, B: int) -> tuple[Tensor, ...]:
        K, O, C = d.pick(2, 3), out * groups, groups
        x = d.tensor(B, C, *(4, 3, 3)[:dims])
        args = [
            x,
            d.tensor(K, O, C // groups, *(2, 3, 2)[:dims]),
            d.coeff(*(() if one else (B,)), K),
        ]
        return (*args, d.tensor(K, O)) if bias else tuple(args)

    return make


def conv_composition(dims: int, label: str, batched, one: bool = False, out=2, **options: Any):
    function = getattr(MF, f"manifold_conv{dims}d")
    bias = len(batched) == 4
    groups = options.get("groups", 1)
    return Composition(
        f"manifold_conv{dims}d",
        label,
        (lambda x, P, c, b: function(x, P, c, b, **options))
        if bias
        else (lambda x, P, c: function(x, P, c, **options)),
        conv(dims, **options),
        conv_args(dims, groups, bias, one, out),
        batched,
    )


SHARED_BASIS = (True, False, True)
FUNCTIONS = (
    Composition(
        "manifold_linear",
        "plain",
        MF.manifold_linear,
        linear,
        linear_args(bias=False),
        SHARED_BASIS,
    ),
    Composition(
        "manifold_linear",
        "tokens_bias",
        MF.manifold_linear,
        linear,
        linear_args((2,)),
        (*SHARED_BASIS, False),
    ),
    Composition(
        "manifold_linear",
        "one_condition",
        MF.manifold_linear,
        linear,
        linear_args(one=True),
        (True, False, False, False),
    ),
    Composition(
        "manifold_linear_local",
        "plain",
        local_call,
        local_linear,
        local_args(bias=False),
        SHARED_BASIS,
    ),
    Composition(
        "manifold_linear_local",
        "tokens_bias",
        local_call,
        local_linear,
        local_args((2,)),
        (*SHARED_BASIS, False),
    ),
    conv_composition(1, "bias", (*SHARED_BASIS, False), padding=1),
    conv_composition(2, "groups", SHARED_BASIS, groups=2, stride=2, padding=1),
    conv_composition(2, "depthwise", (*SHARED_BASIS, False), groups=3, out=1, padding=1),
    conv_composition(2, "one_condition", (True, False, False, False), one=True),
    conv_composition(3, "bias", (*SHARED_BASIS, False), padding=1),
    Composition(
        "interpolate_weights",
        "batch",
        MF.interpolate_weights,
        lambda P, c: blend(c, P),
        lambda d, B: (d.tensor(3, 2, 3), d.coeff(B, 3)),
        (False, True),
    ),
    Composition(
        "interpolate_weights",
        "one_condition",
        lambda P, c: MF.interpolate_weights(P, c[0]),
        lambda P, c: blend(c[0], P),
        lambda d, B: (d.tensor(3, 2, 3), d.coeff(B, 3)),
        (False, True),
        sums=True,
    ),
    Composition(
        "manifold_metric",
        "mean",
        MF.manifold_metric,
        metric,
        lambda d, B: (d.coeff(B, 3),),
        (True,),
        sums=True,
    ),
    Composition(
        "manifold_metric",
        "weighted",
        MF.manifold_metric,
        metric,
        lambda d, B: (d.coeff(B, 3), d.coeff(B)),
        (True, True),
        sums=True,
    ),
    Composition(
        "natural_gradient",
        "batch",
        MF.natural_gradient,
        natural,
        lambda d, B: (d.tensor(B, 3), d.tensor(B, 2), d.coeff(B, 3), d.coeff(3, 3)),
        (True, True, True, False),
        sums=True,
    ),
)


# Rotations of the first 8 and of the last 4 of 10 elements
HADAMARD_SIGNS = torch.tensor([1, -1, -1, 1, 1, 1, -1, 1, -1, 1, 1, -1]).to(torch.int8)


def hadamard_matrix() -> Tensor:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    four = torch.kron(pair, pair)
    first, last = torch.eye(10).double(), torch.eye(10).double()
    first[:8, :8] = torch.kron(pair, four) / 8**0.5 * HADAMARD_SIGNS[:8]
    last[6:, 6:] = four / 2 * HADAMARD_SIGNS[8:]
    return last @ first


HADAMARD_MATRIX = hadamard_matrix()

FUNCTIONS += (
    Composition(
        "hadamard_rotate",
        "ten",
        lambda x: MF.hadamard_rotate(x, HADAMARD_SIGNS.to(x.device)),
        lambda x: x @ HADAMARD_MATRIX.mT.to(x),
        lambda d, B: (d.tensor(B, 10),),
        (True,),
    ),
    Composition(
        "hadamard_rotate",
        "back",
        lambda x: MF.hadamard_rotate(x, HADAMARD_SIGNS.to(x.device), inverse=True),
        lambda x: x @ HADAMARD_MATRIX.to(x),
        lambda d, B: (d.tensor(B, 2, 10),),
        (True,),
    ),
)


# Modules: parameters, input and condition are the arguments, through functional_call


def ellipse(s: Tensor) -> Tensor:
    angle = 2 * torch.pi * s
    return torch.stack((torch.ones_like(s), angle.cos(), angle.sin()), -1)


def hats(s: Tensor) -> Tensor:
    """The closed piecewise-linear curve through four points, where two act at a time."""
    apart = torch.stack([(4 * s - k).remainder(4) for k in range(4)], -1)
    return (1 - torch.minimum(apart, 4 - apart)).clamp(min=0)


CURVES = {
    "ellipse": (nm.Ellipse(), ellipse),
    "piecewise": (nm.PiecewiseLinear(4, closed=True), hats),
}


def module_composition(
    name: str,
    definition: Callable[..., Tensor],
    shape,
    *args: Any,
    curve: str = "ellipse",
    **kwargs: Any,
):
    topology, coefficients = CURVES[curve]
    made = getattr(nm.nn, name)(*args, **kwargs, dtype=torch.float64, topology=topology)
    names = [name for name, _ in made.named_parameters()]

    def call(x, s, *parameters):
        return functional_call(made, dict(zip(names, parameters, strict=True)), (x, s))

    def by_definition(x, s, weight, *bias):
        return definition(
            x,
            weight,
            coefficients(s.to(torch.float64 if x.dtype == torch.float64 else torch.float32)),
            *bias,
        )

    def make(d: Draw, B: int) -> tuple[Tensor, ...]:
        parameters = [d.tensor(*p.shape) for p in made.parameters()]
        return (d.tensor(B, *shape), d.coeff(B), *parameters)

    batched = (True, True, *(False,) * len(names))
    return Composition(name, curve, call, by_definition, make, batched)


MODULES = (
    module_composition("ManifoldLinear", linear, (3,), 3, 2),
    module_composition("ManifoldLinear", linear, (2, 3), 3, 2, curve="piecewise"),
    module_composition("ManifoldConv1d", conv(1, stride=2), (2, 5), 2, 2, 2, stride=2),
    module_composition(
        "ManifoldConv2d", conv(2, padding="same"), (1, 3, 4), 1, 2, 3, padding="same"
    ),
    module_composition("ManifoldConv3d", conv(3), (2, 2, 3, 2), 2, 1, 2, bias=False),
)


FUNCTIONS += fly_compositions.FUNCTIONS
MODULES += fly_compositions.MODULES
ALL = (*FUNCTIONS, *MODULES)
PLAIN_UNDER_TRANSFORMS = ("fly_hash", "fly_readout", "FlyHash", "FlyNet")  # no op runs there
WITHOUT_OPS = ("gain_linear", "ContextModulation", "RandomLinear", "RandomConv2d", "NeuroModNet")
NOT_DIFFERENTIABLE = {
    "manifold_step_": "changes its operands; see test_manifold_step.py",
    "manifold_step_foreach_": "likewise; see test_manifold_step_foreach.py",
    "natural_step_": "changes its operands; see test_natural_step.py",
    "hadamard_rotate_": "changes its operands; see test_hadamard_rotate.py",
}
ABSTRACT = {"ManifoldLayer": "abstract; its children are tested"}

# One of each kind; the others' compiled forms are for the full tier, since compiling takes seconds.
CENTRAL = (
    "manifold_linear-tokens_bias",
    "manifold_linear_local-tokens_bias",
    "manifold_conv2d-groups",
    "interpolate_weights-batch",
    "manifold_metric-weighted",
    "natural_gradient-batch",
    "ManifoldLinear-ellipse",
    "ManifoldConv2d-ellipse",
    "fly_hash-plain",
    "fly_readout-tasks",
    "hadamard_rotate-back",
    "gain_linear-tasks",
    "FlyNet-fixed",
)
every = pytest.mark.parametrize("entry", ALL, ids=[entry.id for entry in ALL])
central_first = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.id, marks=[] if entry.id in CENTRAL else pytest.mark.full)
        for entry in ALL
    ],
)
