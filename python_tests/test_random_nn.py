"""Layers of fixed random weights and their modulation: seeds, tasks, and what may be trained."""

import copy
import hashlib
import io

import pytest
import torch
from torch import Tensor, nn

import neuromod_ext as nm
from neuromod_ext.nn import (
    ContextModulation,
    FlyHash,
    FlyNet,
    NeuroModNet,
    RandomConv2d,
    RandomLinear,
)

X = torch.rand(6, 20, generator=torch.Generator().manual_seed(3))


def net(tasks: int = 2) -> FlyNet:
    return FlyNet(20, 64, 3, num_tasks=tasks)


NETS = {
    "fly": net,
    "dense": lambda tasks=2: NeuroModNet.dense((20, 16, 3), tasks),
}
each = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def train(model: nn.Module, task: int, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(X, task).square().sum().backward()
        optimizer.step()


def inference(model: nn.Module, task: int | Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(X, task)


# Fixed weights


def test_seeds_stand_for_bits() -> None:
    """The same on every machine: pinned."""
    layers = FlyHash(784, 7840), RandomLinear(30, 40, seed=5), RandomConv2d(3, 4, 5, seed=2**40)
    digests = [
        hashlib.sha256(next(layer.buffers()).numpy().tobytes()).hexdigest()[:16] for layer in layers
    ]
    assert digests == PINNED


PINNED = ["816e5d1ee0094ba4", "f164a5f736cfec1a", "76991464225c64a3"]


def test_hash_index() -> None:
    index = FlyHash(50, 3000, seed=1).index
    assert index.dtype == torch.int32
    assert index.min() == 0
    assert index.max() == 49
    assert (index.diff(dim=1) > 0).all(), "sorted, no input twice"
    counts = index.flatten().bincount(minlength=50).double()
    expected = 3000 * 7 / 50
    deviation = (expected * (1 - 7 / 50)) ** 0.5
    assert ((counts - expected).abs() < 5 * deviation).all()
    assert torch.equal(FlyHash(4, 9, 4).index, torch.arange(4).expand(9, 4))


def test_weights_are_drawn_as_torch_does() -> None:
    for layer, fan_in in ((RandomLinear(400, 300), 400), (RandomConv2d(16, 90, 5), 400)):
        weight = layer.weight
        assert weight.abs().max() <= 0.05
        assert weight.mean().abs() < 5 * 0.05 / (3 * weight.numel()) ** 0.5
        assert abs(weight.std() / (0.05 / 3**0.5) - 1) < 0.02
        assert fan_in == weight[0].numel()


def test_seeds_and_streams_differ() -> None:
    drawn = [RandomLinear(8, 8, seed=s, stream=t).weight for s, t in ((0, 0), (1, 0), (0, 1))]
    assert len({hash(w.numpy().tobytes()) for w in drawn}) == 3
    assert torch.equal(RandomLinear(8, 8, seed=1).weight, drawn[1])
    assert torch.equal(RandomLinear(8, 8, dtype=torch.float64, seed=1).weight.float(), drawn[1])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_bad_seeds(seed: int) -> None:
    with pytest.raises(ValueError, match=r"expected seed in \[0, 2\*\*63\), got"):
        RandomLinear(3, 2, seed=seed)


def test_only_the_seed_is_stored() -> None:
    layer = RandomConv2d(3, 4, 5, seed=9)
    state = layer.state_dict()
    assert {k: v.tolist() for k, v in state.items()} == {"_extra_state": [9, 0]}
    other = RandomConv2d(3, 4, 5, seed=1)
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)
    assert other.seed == 9
    assert not list(layer.parameters())


def test_given_weights_are_stored() -> None:
    weight = torch.randn(2, 3, dtype=torch.float64)
    layer = RandomLinear(3, 2, weight=weight)
    assert torch.equal(layer.weight, weight)
    other = RandomLinear(3, 2, weight=torch.zeros(2, 3).double())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, weight)
    with pytest.raises((RuntimeError, ValueError)):
        RandomLinear(3, 2).load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"RandomLinear: expected weight of shape \[2, 3\], got"):
        RandomLinear(3, 2, weight=weight.T)
    index = torch.tensor([[0, 1], [2, 2]])
    assert torch.equal(FlyHash(3, 2, index=index).index, index)
    with pytest.raises(ValueError, match=r"FlyHash: expected index with entries in \[0, I\)"):
        FlyHash(2, 2, index=index)
    with pytest.raises(ValueError, match="FlyHash: expected 0 <= fan_in <= in_features = 3, got 4"):
        FlyHash(3, 2, 4)


def test_from_meta() -> None:
    with torch.device("meta"):
        layer = RandomLinear(8, 4, seed=2)
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.weight, RandomLinear(8, 4, seed=2).weight)


# Tasks


def test_initial_values() -> None:
    """Xavier-normal of [1, F] and [1, 1]."""
    torch.manual_seed(0)
    modulation = ContextModulation(999, 200)
    gains, strengths = torch.stack(list(modulation.gain)), torch.stack(list(modulation.strength))
    assert abs(gains.std() / (2 / 1000) ** 0.5 - 1) < 0.01
    assert 0.85 < strengths.std() < 1.15
    assert torch.equal(modulation.context_vectors(), gains * strengths)
    assert sum(p.numel() for p in modulation.task_parameters(0)) == 1000


@each
def test_tasks_do_not_touch_each_other(make) -> None:
    """Old tasks' outputs stay the same to the bit, through training by any optimizer of all."""
    model = make()
    for optimizer in (
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1),
    ):
        train(model, 0, optimizer)
        model.freeze_task(0)
        before = [p.clone() for p in model.task_parameters(0)]
        outputs = inference(model, 0)
        changed = inference(model, 1)
        train(model, 1, optimizer)
        assert not torch.equal(inference(model, 1), changed)
        assert torch.equal(inference(model, 0), outputs)
        for p, was in zip(model.task_parameters(0), before, strict=True):
            assert torch.equal(p, was)
            assert p.grad is None
            assert not p.requires_grad
        for p in model.task_parameters(0):  # train it on, for the next optimizer
            p.requires_grad_()
        for modulation in model.modulations():
            modulation.set_extra_state(torch.zeros(2, dtype=torch.bool))


@each
def test_frozen_tasks_are_refused_in_training(make) -> None:
    model = make()
    model.freeze_task(0)
    mixed = torch.tensor([1, 1, 0, 1, 1, 1])
    for task in (0, mixed):
        with pytest.raises(
            ValueError, match="expected a task that is not frozen while training, got 0"
        ):
            model(X, task)
        with torch.no_grad():
            model(X, task)
    model.eval()
    out = model(X, mixed)
    assert out.grad_fn is not None  # task 1 is not frozen
    assert not model(X, 0).requires_grad
    model.requires_grad_(True)  # by accident
    model(X, mixed).sum().backward()
    assert all(p.grad is None for p in model.task_parameters(0))
    assert all(p.grad is not None for p in model.task_parameters(1))


def test_freezing_while_a_backward_pass_is_pending() -> None:
    model = net()
    loss = model(X, 0).sum()
    model.freeze_task(0)
    loss.backward()
    assert all(p.grad is None for p in model.task_parameters(0))


@each
@pytest.mark.parametrize("task", [-1, 2, torch.tensor([0, 1, 2, 0, 0, 0]), torch.full((6,), -1)])
def test_unknown_tasks(make, task) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"expected task in \[0, T\) = \[0, 2\), got"):
        model(X, task)
    assert all(p.grad is None for p in model.parameters())


@each
def test_other_bad_tasks(make) -> None:
    model = make(0)
    with pytest.raises(ValueError, match="expected a task, got none; pass one or call use_task"):
        model(X)
    model = make()
    with pytest.raises(ValueError, match=r"expected task of shape \[B\] = \[6\], got \[5\]"):
        model(X, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected task of dtype int64, got"):
        model(X, torch.zeros(6))
    for task in ("one", 1.0, True, torch.tensor(1.0)):
        with pytest.raises(
            TypeError, match="expected task to be a number or a Tensor of dtype int64"
        ):
            model(X, task)
    for bad in (5, -1):
        for call in (model.use_task, model.freeze_task, model.is_frozen):
            with pytest.raises(ValueError, match="expected task in"):
                call(bad)


@each
def test_mixed_batches(make) -> None:
    """Each sample gets its task's outputs, and each task its samples' gradients."""
    model = make(3).double()
    x, task = X.double(), torch.tensor([2, 0, 2, 2, 0, 0])
    mixed = model(x, task)
    for t in (0, 2):
        torch.testing.assert_close(mixed[task == t], model(x, t)[task == t], rtol=1e-12, atol=0)
    mixed.sin().sum().backward()
    grads = {t: [p.grad for p in model.task_parameters(t)] for t in range(3)}
    assert all(g is None for g in grads[1])
    for t in (0, 2):
        alone = torch.autograd.grad(
            model(x[task == t], t).sin().sum(), list(model.task_parameters(t))
        )
        torch.testing.assert_close(grads[t], list(alone), rtol=1e-9, atol=1e-12)
    assert model(x[:0], task[:0]).shape == (0, 3)


def test_the_current_task() -> None:
    model = net(0)
    assert [model.add_task(), model.add_task()] == [0, 1]
    assert torch.equal(model(X), model(X, 1))
    model.use_task(0)
    assert torch.equal(model(X), model(X, torch.tensor(0)))
    model.freeze_task()
    assert [model.is_frozen(t) for t in (0, 1)] == [True, False]


def test_fly_net_is_its_formula() -> None:
    model = FlyNet(20, 64, 3, num_tasks=1, dtype=torch.float64)
    x = X.double().reshape(6, 4, 5)
    z = model.representation(x, 0)
    h = nm.functional.fly_hash(x.flatten(1), model.hash.index)
    torch.testing.assert_close(z, h * model.modulation.context_vectors()[0])
    torch.testing.assert_close(model(x), z @ model.readout.weight.T)


def test_conv_net() -> None:
    model = NeuroModNet.conv(1, (4, 5), 3, 12, num_tasks=2)
    x = torch.rand(6, 1, 12, 12)
    task = torch.tensor([0, 1, 1, 0, 1, 0])
    y = model(x, task)
    for t in (0, 1):
        torch.testing.assert_close(y[task == t], model(x, t)[task == t])
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(
        ValueError, match="expected a RandomLinear or RandomConv2d among the layers"
    ):
        NeuroModNet([nn.Linear(3, 2)])


# Keeping


@each
def test_state_dict_brings_tasks_along(make) -> None:
    model = make(3)
    model.freeze_task(1)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other = make(1)
    other.load_state_dict(torch.load(stored))
    assert other.num_tasks == 3
    assert [other.is_frozen(t) for t in range(3)] == [False, True, False]
    assert [p.requires_grad for p in other.task_parameters(1)] == [False] * (
        2 * len(other.modulations())
    )
    for t in range(3):
        assert torch.equal(inference(other, t), inference(model, t))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(make(1).state_dict())


@each
def test_copies(make) -> None:
    model = make(2)
    model.freeze_task(0)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert other.is_frozen(0)
        assert not other.is_frozen(1)
        assert torch.equal(inference(other, 1), inference(model, 1))
        assert other.add_task() == 2
    assert model.num_tasks == 2


@each
def test_dtypes_follow(make) -> None:
    model = make(0).to(torch.bfloat16)
    model.add_task()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(X.bfloat16()).dtype == torch.bfloat16


@each
def test_compiled(make) -> None:
    model = make(2)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for task in (0, 1, torch.tensor([1, 0, 0, 1, 1, 0])):
        torch.testing.assert_close(run(X, task), model(X, task))
    model.eval().freeze_task(0)
    torch._dynamo.reset()
    run(X, torch.tensor([1, 0, 0, 1, 1, 0])).sum().backward()
    assert all(p.grad is None for p in model.task_parameters(0))
    assert all(p.grad is not None for p in model.task_parameters(1))


def test_a_state_dict_draws_again() -> None:
    """Also where the seed is the same: what is there need not be what was drawn."""
    saved = NeuroModNet.dense((20, 16, 3), 1, seed=3)
    with torch.device("meta"):
        bare = NeuroModNet.dense((20, 16, 3), 1, seed=3)
    rounded = NeuroModNet.dense((20, 16, 3), 1, seed=3).bfloat16().float()
    for model in (bare.to_empty(device="cpu"), rounded):
        model.load_state_dict(saved.state_dict())
        assert torch.equal(model(X, 0), saved(X, 0))


def test_inputs_of_another_width_are_refused() -> None:
    """The index of a hash fits every input that is wide enough."""
    for model, name in ((FlyHash(20, 64), "FlyHash"), (net(), "FlyNet")):
        for shape in ((6, 19), (6, 21), (20,)):
            with pytest.raises(ValueError, match=rf"^{name}: expected input of shape \[B, I\] = "):
                model(torch.rand(shape))
    assert net()(X.view(6, 4, 5), 0).shape == (6, 3)
    with pytest.raises(ValueError, match="FlyNet: expected input"):
        net().representation(torch.rand(6, 21), 0)
