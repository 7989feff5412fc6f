"""ManifoldSGD against torch.optim.SGD, in float64; the path does not depend on the basis."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from training import batch, model, train

import neuromod_ext as nm
import neuromod_ext.functional as MF
from neuromod_ext.optim import ManifoldSGD, sgd

F64 = torch.float64
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.8, "nesterov": True},
    {"weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"momentum": 0.5, "maximize": True},
]
options_ = pytest.mark.parametrize("options", OPTIONS, ids=str)


@options_
def test_is_torch_sgd_on_other_coordinates(options) -> None:
    """Q with P = G^{-1/2} Q, through a whole model, its ordinary layers included."""
    topology = nm.Bezier(2)
    net, other = model(topology), model(topology)
    values, vectors = torch.linalg.eigh(topology.gram())
    half = vectors @ values.rsqrt().diag() @ vectors.T  # G^{-1/2}
    manifold = {name for name, p in other.named_parameters() if hasattr(p, "manifold")}
    assert len(manifold) == 4
    Q = {
        name: nn.Parameter(
            torch.tensordot(half.inverse(), p.detach(), 1)
            if name in manifold
            else p.detach().clone()
        )
        for name, p in other.named_parameters()
    }
    ours, theirs = (
        ManifoldSGD(net.parameters(), 0.02, **options),
        torch.optim.SGD(Q.values(), 0.02, **options),
    )
    for step in range(6):
        train(net, ours, topology, range(step, step + 1))
        theirs.zero_grad()
        P = {n: torch.tensordot(half, q, 1) if n in manifold else q for n, q in Q.items()}
        functional_call(other, P, batch(topology, step)).sin().square().sum().backward()
        theirs.step()
    for name, p in net.named_parameters():
        want = torch.tensordot(half, Q[name], 1) if name in manifold else Q[name]
        torch.testing.assert_close(p, want)


def shifted(phase: float) -> nm.Topology:
    def function(s):
        angle = 2 * torch.pi * (s + phase)
        return torch.stack((torch.ones_like(s), angle.cos(), angle.sin()), -1)

    return nm.Custom(function, 3, closed=True)


def monomial(s):
    return torch.stack((torch.ones_like(s), s), -1)


def change_of_basis(old: nm.Topology, new: nm.Topology) -> torch.Tensor:
    """A with c_new(s) = A c_old(s)."""
    s = old.sample(50, dtype=F64)
    return torch.linalg.lstsq(old(s), new(s)).solution.T


PAIRS = {
    "line": (nm.Line(), nm.Custom(monomial, 2)),
    "ellipse": (nm.Ellipse(), shifted(0.13)),
}


def paths(pair: str, optimizer, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W(s) along the manifold after training in two bases of one span, and how far it went."""
    first, second = PAIRS[pair]
    A = change_of_basis(first, second)
    net, other = model(first), model(second)
    with torch.no_grad():  # W = c_old . P = c_new . A^{-T} P
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            q.copy_(torch.tensordot(torch.linalg.inv(A).T, p, 1) if hasattr(p, "manifold") else p)
    s = first.quadrature()[0]
    curve = lambda n, t: MF.interpolate_weights(n.module[0].weight, t(s))
    start = curve(net, first).detach()
    torch.testing.assert_close(curve(other, second), start)
    for n in (net, other):
        train(n, optimizer(n.parameters(), lr=0.05, **options), first, range(5))
    return curve(net, first), curve(other, second), start


@pytest.mark.parametrize("pair", PAIRS)
@options_
def test_the_path_does_not_depend_on_the_basis(pair, options) -> None:
    one, two, start = paths(pair, ManifoldSGD, **options)
    assert (one - start).abs().max() > 1e-2
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_the_path_of_plain_sgd_does(options) -> None:
    """The line's bases are not related by a rotation, so plain SGD tells them apart."""
    one, two, _ = paths("line", torch.optim.SGD, **options)
    assert (one - two).abs().max() > 1e-3


@options_
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_basis_point_is_torch_sgd(options, dtype) -> None:
    """K = 1 and c = 1: no metric, to an ulp of what is stored."""
    layer = nm.nn.ManifoldLinear(5, 3, topology=nm.Simplex(1), dtype=dtype)
    plain = nn.Linear(5, 3, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.weight[0]), plain.bias.copy_(layer.bias[0])
    ours, theirs = (
        ManifoldSGD(layer.parameters(), 0.1, **options),
        torch.optim.SGD(plain.parameters(), 0.1, **options),
    )
    for step in range(3):
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            q.grad = torch.randn(
                q.shape, dtype=dtype, generator=torch.Generator().manual_seed(step)
            )
            p.grad = q.grad[None].clone()
        ours.step(), theirs.step()
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        size = q.abs().clamp(min=1)
        assert ((p[0] - q).abs() <= 4 * torch.finfo(dtype).eps * size).all()


def test_ordinary_parameters_beside_them_and_groups() -> None:
    """Groups have numbers of their own; scalars and missing gradients are as in torch."""
    scalar, unused = nn.Parameter(torch.tensor(2.0, dtype=F64)), nn.Parameter(torch.ones(3))
    layer = nm.nn.ManifoldLinear(2, 2, topology=nm.Line(), dtype=F64)
    groups = [
        {"params": [scalar, unused], "lr": 1.0, "momentum": 0.5},
        {"params": layer.parameters()},
    ]
    optimizer = ManifoldSGD(groups, lr=0.5)
    before = layer.weight.detach().clone()
    for _ in range(2):
        scalar.grad, layer.weight.grad = (
            torch.tensor(0.25, dtype=F64),
            torch.ones(2, 2, 2, dtype=F64),
        )
        optimizer.step()
    assert scalar.item() == 2 - 0.25 - (0.125 + 0.25)
    assert torch.equal(unused, torch.ones(3))
    torch.testing.assert_close(layer.weight, before - 2 * 0.5 * 2)  # G^-1 (1, 1) = (2, 2)


# What surrounds an optimizer


def test_closure() -> None:
    net = model(nm.Line())
    optimizer = ManifoldSGD(net.parameters(), 0.01)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = net(*batch(nm.Line(), 0)).square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert [optimizer.step(closure).item() for _ in range(3)] == calls
    assert calls[0] > calls[1] > calls[2]
    assert optimizer.step() is None


def test_schedulers() -> None:
    net, other = model(nm.Line()), model(nm.Line())
    scheduled = ManifoldSGD(net.parameters(), 0.1)
    by_hand = ManifoldSGD(other.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, 1, gamma=0.5)
    for step in range(3):
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5**step
        train(net, scheduled, nm.Line(), range(step, step + 1))
        train(other, by_hand, nm.Line(), range(step, step + 1))
        scheduler.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_tensor_as_learning_rate() -> None:
    net, other = model(nm.Line()), model(nm.Line())
    train(net, ManifoldSGD(net.parameters(), torch.tensor(0.25)), nm.Line(), range(2))
    train(other, ManifoldSGD(other.parameters(), 0.25), nm.Line(), range(2))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@options_
def test_foreach_is_each_by_itself(options) -> None:
    """To the bit, in groups of several dtypes, with scalars, and with who joins later."""

    def run(foreach):
        net = model(nm.Ellipse())
        scalar, narrow = nn.Parameter(torch.tensor(2.0, dtype=F64)), nn.Parameter(torch.ones(3, 2))
        optimizer = ManifoldSGD(
            [*net.parameters(), scalar, narrow], 0.05, foreach=foreach, **options
        )
        for step in range(3):
            optimizer.zero_grad()
            net(*batch(nm.Ellipse(), step)).sin().square().sum().backward()
            scalar.grad = torch.tensor(0.5, dtype=F64)
            narrow.grad = torch.ones(3, 2) if step else None
            optimizer.step()
        return [*net.parameters(), scalar, narrow]

    one = run(False)
    for foreach in (True, None):
        assert all(torch.equal(p, q) for p, q in zip(run(foreach), one, strict=True))


def test_a_group_is_one_call(monkeypatch) -> None:
    calls = []
    step = MF.manifold_step_foreach_
    monkeypatch.setattr(
        MF, "manifold_step_foreach_", lambda p, *a, **k: calls.append(len(p)) or step(p, *a, **k)
    )
    for foreach in (None, False):
        net = model(nm.Ellipse())
        count = len(list(net.parameters()))
        train(net, ManifoldSGD(net.parameters(), 0.1, foreach=foreach), nm.Ellipse(), range(1))
        assert calls == ([count] if foreach is None else [1] * count)
        calls.clear()


@options_
def test_capturable_is_the_same_with_the_rate_in_a_tensor(options) -> None:
    """A scheduler writes into the tensor that a captured step would read."""
    net, other = model(nm.Line()), model(nm.Line())
    optimizer = ManifoldSGD(net.parameters(), 0.1, capturable=True, **options)
    plain = ManifoldSGD(other.parameters(), 0.1, **options)
    rate = optimizer.param_groups[0]["lr"]
    assert rate.dtype == F64
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (optimizer, plain)]
    for step in range(3):
        train(net, optimizer, nm.Line(), range(step, step + 1))
        train(other, plain, nm.Line(), range(step, step + 1))
        [scheduler.step() for scheduler in schedulers]
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.0125
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_captured_is_refused() -> None:
    metric = nm.optim.EmpiricalMetric(nm.Line())
    with pytest.raises(ValueError, match="ManifoldSGD: expected no empirical metric with captur"):
        ManifoldSGD(model(nm.Line()).parameters(), 0.1, metric=metric, capturable=True)
    for capturable, first, words in (
        (False, False, "capturable=True"),
        (True, True, "a step before"),
    ):
        with pytest.raises(RuntimeError, match=f"ManifoldSGD: expected {words}"):
            sgd._check_capture({"capturable": capturable}, first)
    sgd._check_capture({"capturable": True}, False)


def test_a_state_of_before_these_options() -> None:
    optimizer = ManifoldSGD(model(nm.Line()).parameters(), 0.1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["foreach"], group["capturable"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["capturable"] is False
    assert optimizer.param_groups[0]["foreach"] is None


def test_grad_scaler() -> None:
    """Scaled gradients are unscaled; a step with an infinite one is skipped."""
    net = model(nm.Ellipse()).float()
    optimizer = ManifoldSGD(net.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, s = (t.float() for t in batch(nm.Ellipse(), 0))
    twin = copy.deepcopy(net)
    plain = ManifoldSGD(twin.parameters(), 0.1, momentum=0.9)
    scaler.scale(net(x, s).square().sum()).backward()
    scaler.step(optimizer), scaler.update()
    twin(x, s).square().sum().backward()
    plain.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    scaler.scale(net(x * float("inf"), s).sum()).backward()
    scaler.step(optimizer), scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_foreach_hooks_and_add_param_group() -> None:
    seen = []
    net = model(nm.Line())
    optimizer = ManifoldSGD(net.module[0].parameters(), 0.1)
    optimizer.add_param_group({"params": net.module[3].parameters(), "lr": 0.2, "momentum": 0.5})
    optimizer.register_step_post_hook(lambda *args: seen.append(len(args)))
    train(net, optimizer, nm.Line(), range(2))
    assert len(seen) == 2
    assert [len(optimizer.state[p]) for p in net.module[3].parameters()] == [1, 1]
    assert not optimizer.state[net.module[0].weight]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"lr": -1.0}, "expected lr >= 0, got -1.0"),
        ({"lr": float("nan")}, "expected lr >= 0, got nan"),
        ({"lr": float("inf")}, "expected lr >= 0, got inf"),
        ({"momentum": -0.5}, "expected momentum >= 0, got -0.5"),
        ({"momentum": float("inf")}, "expected momentum >= 0, got inf"),
        ({"dampening": float("nan")}, "expected dampening to be finite, got nan"),
        ({"weight_decay": -1e-3}, "expected weight_decay >= 0, got -0.001"),
        ({"weight_decay": float("nan")}, "expected weight_decay >= 0, got nan"),
        ({"nesterov": True}, "expected momentum > 0 and dampening = 0 for nesterov"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "expected momentum > 0 and dampening = 0 for nesterov",
        ),
    ],
)
def test_bad_numbers(numbers, words) -> None:
    with pytest.raises(ValueError, match=f"ManifoldSGD: {words}"):
        ManifoldSGD(model(nm.Line()).parameters(), **numbers)


def test_sparse_gradients_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.manifold = nm.Ellipse()
    parameter.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(
        RuntimeError, match="ManifoldSGD: expected dense gradients, got a sparse one"
    ):
        ManifoldSGD([parameter], 0.1).step()
    assert torch.equal(parameter, torch.ones(3, 2))
