"""What optimizers keep, what parameters carry, and that both survive copies and checkpoints."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from training import batch, model, train

import neuromod_ext as nm
from neuromod_ext.optim import EmpiricalMetric, ManifoldSGD


def round_trip(value, how: str, tmp_path):
    if how == "torch":
        torch.save(value, tmp_path / "state")
        return torch.load(tmp_path / "state")
    return pickle.loads(pickle.dumps(value)) if how == "pickle" else copy.deepcopy(value)


@pytest.mark.parametrize("how", ["torch", "pickle", "deepcopy"])
@pytest.mark.parametrize("empirical", [False, True])
def test_interrupted_training_resumes_to_the_bit(how, empirical, tmp_path) -> None:
    topology = nm.Ellipse()

    def start():
        net = model(topology)
        metric = EmpiricalMetric(topology, decay=0.5) if empirical else None
        return (
            net,
            metric,
            ManifoldSGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.01, metric=metric),
        )

    def go(net, metric, optimizer, steps):
        for step in steps:
            if metric is not None:
                metric.update(batch(topology, step)[1])
            train(net, optimizer, topology, range(step, step + 1))

    whole, metric, optimizer = start()
    go(whole, metric, optimizer, range(6))
    first, metric, optimizer = start()
    go(first, metric, optimizer, range(3))
    saved = round_trip((first.state_dict(), optimizer.state_dict()), how, tmp_path)
    second, metric, optimizer = start()
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    go(second, metric, optimizer, range(3, 6))
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


KEEPING = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "to": lambda net: net.to(torch.float32),
    "double": lambda net: net.double(),
    "cpu": lambda net: net.cpu(),
    "assign": lambda net: (
        net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True),
        net,
    )[1],
    "load": lambda net: (net.load_state_dict(net.state_dict()), net)[1],
    "to_empty": lambda net: net.to_empty(device="cpu"),
    "requires_grad_": lambda net: net.requires_grad_(False).requires_grad_(),
    "share_memory": lambda net: net.share_memory(),
    "half": lambda net: net.half(),
    "reassigned": lambda net: (
        setattr(net.module[0], "weight", nn.Parameter(net.module[0].weight.detach().clone())),
        net,
    )[1],
}


@pytest.mark.parametrize("how", KEEPING)
def test_parameters_keep_their_topology(how) -> None:
    topology = nm.Ellipse()
    net = KEEPING[how](model(topology))
    layers = [net.module[0], net.module[3]]
    assert all(p.manifold == topology for layer in layers for p in layer.parameters())
    assert not hasattr(net.module[2].weight, "manifold")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ManifoldSGD(net.parameters(), 0.1)


def test_a_swapped_parameter_keeps_its_topology() -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = nm.nn.ManifoldLinear(2, 3, topology=nm.Line()).double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert layer.weight.manifold == layer.bias.manifold == nm.Line()


def test_copies_of_parameters_warn() -> None:
    with pytest.warns(UserWarning, match="ManifoldSGD: no parameter of a manifold layer"):
        ManifoldSGD([nn.Parameter(p.detach().clone()) for p in model(nm.Line()).parameters()], 0.1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("empirical", [False, True])
def test_a_copied_optimizer_goes_on(how, empirical, tmp_path) -> None:
    topology = nm.Ellipse()
    net = model(topology)
    metric = EmpiricalMetric(topology) if empirical else None
    if metric is not None:
        metric.update(torch.rand(32, dtype=torch.float64))
    optimizer = ManifoldSGD(net.parameters(), 0.05, momentum=0.9, metric=metric)
    train(net, optimizer, topology, range(2))
    copied_net, copied = round_trip((net, optimizer), how, tmp_path)
    train(net, optimizer, topology, range(2, 4))
    train(copied_net, copied, topology, range(2, 4))
    for p, q in zip(net.parameters(), copied_net.parameters(), strict=True):
        assert torch.equal(p, q)
    assert copied.state_dict().keys() == optimizer.state_dict().keys()
