"""A small manifold model, its batches and a few steps of training, for the tests of optimizers."""

import torch
from torch import nn

import neuromod_ext as nm

F64 = torch.float64


def model(topology: nm.Topology, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).to(F64)
    return nm.convert(plain, topology)


def batch(topology: nm.Topology, seed: int):
    generator = torch.Generator().manual_seed(seed)
    s = topology.sample(6, generator=generator, dtype=F64)
    return torch.randn(6, 4, generator=generator, dtype=F64), s


def train(net: nn.Module, optimizer, topology: nm.Topology, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(*batch(topology, step)).sin().square().sum().backward()
        optimizer.step()
