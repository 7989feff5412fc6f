"""Those of fly hashing, gains, and random weights; see :mod:`compositions`.

The definitions write an index as the binary matrix that it stands for.
"""

import copy
from collections.abc import Callable

import torch
from composition import Composition
from sampling import Draw
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import neuromod_ext as nm
import neuromod_ext.functional as MF

FLY_INDEX = torch.tensor([[0, 2], [1, 3], [3, 3], [0, 1], [2, 1]])


def binary(index: Tensor, inputs: int, like: Tensor) -> Tensor:
    return F.one_hot(index.long(), inputs).sum(1).to(like)


def fly(x: Tensor, index: Tensor = FLY_INDEX) -> Tensor:
    m = x @ binary(index, x.shape[-1], x).mT
    return (m - m.mean(-1, keepdim=True)).relu()


def task_of(x: Tensor) -> Tensor:
    """Each sample's, of two."""
    return torch.arange(x.shape[0], device=x.device) % 2


FUNCTIONS = (
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


# Modules of fixed weights


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


MODULES = (
    fixed_composition(FLY_NET, fly_net, (3, 2)),
    fixed_composition(nm.nn.FlyHash(6, 8, 2), lambda x: fly(x, FLY_NET.hash.index), (6,)),
    fixed_composition(nm.nn.ContextModulation(3, 1), lambda x, v, a: x * (a * v), (2, 3)),
    fixed_composition(LINEAR, lambda x: x @ LINEAR.weight.to(x).mT, (3,)),
    fixed_composition(
        KERNEL, lambda x: F.conv2d(x, KERNEL.weight.to(x), stride=2, padding=1), (2, 3, 3)
    ),
    fixed_composition(DENSE_NET, dense_net, (3,)),
)
