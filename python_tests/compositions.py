"""Public functions and modules as functions of tensors, each with its definition in plain torch.

The definitions form every sample's weight and apply torch's own layer to it; they know nothing of
the library, and are differentiable to any order, so they are the oracle of every transform.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sampling import Draw
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import neuromod_ext as nm
import neuromod_ext.functional as MF


@dataclass(frozen=True)
class Composition:
    """A differentiable call.

    Attributes:
        subject: The public name.
        label: Tells it from others of the same subject.
        call: The library's, of tensors.
        definition: The same in plain torch.
        make: Its arguments for a batch size.
        batched: Which arguments lead with the batch; if ``sums``, the result sums over it.
        sums: Whether the result has no batch dimension.
    """

    subject: str
    label: str
    call: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    make: Callable[[Draw, int], tuple[Tensor, ...]]
    batched: tuple[bool, ...]
    sums: bool = False

    @property
    def id(self) -> str:
        return f"{self.subject}-{self.label}"


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


# Fly hashing, and gains; the index is written as the binary matrix that it stands for

FLY_INDEX = torch.tensor([[0, 2], [1, 3], [3, 3], [0, 1], [2, 1]])


def binary(index: Tensor, inputs: int, like: Tensor) -> Tensor:
    return F.one_hot(index.long(), inputs).sum(1).to(like)


def fly(x: Tensor, index: Tensor = FLY_INDEX) -> Tensor:
    m = x @ binary(index, x.shape[-1], x).mT
    return (m - m.mean(-1, keepdim=True)).relu()


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


def task_of(x: Tensor) -> Tensor:
    """Each sample's, of two."""
    return torch.arange(x.shape[0], device=x.device) % 2


FUNCTIONS += (
    Composition(
        "fly_hash",
        "plain",
        lambda x: MF.fly_hash(x, FLY_INDEX.to(x.device)),
        fly,
        lambda d, B: (d.tensor(B, 4),),
        (True,),
    ),
    Composition(
        "fly_readout",
        "plain",
        lambda x, v, R: MF.fly_readout(x, FLY_INDEX.to(x.device).int(), v, R),
        lambda x, v, R: (fly(x) * v) @ R.mT,
        lambda d, B: (d.tensor(B, 4), d.tensor(5), d.tensor(3, 5)),
        (True, False, False),
    ),
    Composition(
        "fly_readout",
        "tasks",
        lambda x, v, R: MF.fly_readout(x, FLY_INDEX.to(x.device), v, R, task_of(x)),
        lambda x, v, R: (fly(x) * v[task_of(x)]) @ R.mT,
        lambda d, B: (d.tensor(B, 4), d.tensor(2, 5), d.tensor(3, 5)),
        (True, False, False),
    ),
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
    Composition(
        "gain_linear",
        "plain",
        MF.gain_linear,
        lambda x, v, W, b: (x * v) @ W.mT + b,
        lambda d, B: (d.tensor(B, 2, 4), d.tensor(4), d.tensor(3, 4), d.tensor(3)),
        (True, False, False, False),
    ),
    Composition(
        "gain_linear",
        "tasks",
        lambda x, v, W: MF.gain_linear(x, v, W, task=task_of(x)),
        lambda x, v, W: (x * v[task_of(x)]) @ W.mT,
        lambda d, B: (d.tensor(B, 4), d.tensor(2, 4), d.tensor(3, 4)),
        (True, False, False),
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


def fixed_composition(made: torch.nn.Module, definition: Callable[..., Tensor], shape):
    """A module of fixed weights; what it trains, of one task, is given as parameters."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    copies = {
        (device, dtype): copy.deepcopy(made).to(device, dtype)
        for device in devices
        for dtype in (torch.float64, torch.float32)
    }
    parameters = dict(made.named_parameters())

    def call(x, *values):
        module = copies[x.device.type, x.dtype]
        return functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    def make(d: Draw, B: int) -> tuple[Tensor, ...]:
        return (d.tensor(B, *shape), *(d.tensor(*p.shape) for p in parameters.values()))

    batched = (True, *(False,) * len(parameters))
    return Composition(type(made).__name__, "fixed", call, definition, make, batched)


FLY_NET = nm.nn.FlyNet(6, 8, 3, fan_in=2, num_tasks=1, dtype=torch.float64)
DENSE_NET = nm.nn.NeuroModNet.dense((3, 4, 2), num_tasks=1, dtype=torch.float64)
LINEAR = nm.nn.RandomLinear(3, 2, dtype=torch.float64, seed=1)
KERNEL = nm.nn.RandomConv2d(2, 3, 2, 2, 1, dtype=torch.float64)


def fly_net(x: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    h = fly(x.flatten(1), FLY_NET.hash.index.to(x.device))
    return (h * v) @ (alpha * FLY_NET.readout.weight.to(x)).mT


def dense_net(x: Tensor, v0: Tensor, a0: Tensor, v1: Tensor, a1: Tensor) -> Tensor:
    first, second = (DENSE_NET.layers[i].weight.to(x) for i in (1, 3))
    return (a0 * ((x * v0) @ first.mT)).relu() * v1 @ (a1 * second).mT


MODULES += (
    fixed_composition(FLY_NET, fly_net, (3, 2)),
    fixed_composition(nm.nn.FlyHash(6, 8, 2), lambda x: fly(x, FLY_NET.hash.index), (6,)),
    fixed_composition(nm.nn.ContextModulation(3, 1), lambda x, v, a: x * (a * v), (2, 3)),
    fixed_composition(LINEAR, lambda x: x @ LINEAR.weight.to(x).mT, (3,)),
    fixed_composition(
        KERNEL, lambda x: F.conv2d(x, KERNEL.weight.to(x), stride=2, padding=1), (2, 3, 3)
    ),
    fixed_composition(DENSE_NET, dense_net, (3,)),
)
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
