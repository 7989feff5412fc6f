"""Public functions, layers and optimizers on every backend, as a user calls them.

The other files try ops on every backend, and what users call on the CPU's. Here the emulated ops
take the place of those, and each test sees that they were called.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from compositions import ALL, PLAIN_UNDER_TRANSFORMS, WITHOUT_OPS, Composition, linear
from conftest import Backend
from sampling import Draw
from test_gradients import leaves
from torch import Tensor, nn
from training import batch, model

import neuromod_ext as nm
import neuromod_ext.functional as MF
from neuromod_ext import _contraction, _derivatives, _ops, reference
from neuromod_ext._contraction import NODES
from neuromod_ext.optim import EmpiricalMetric, ManifoldSGD

F64 = torch.float64
ON_OPS = [entry for entry in ALL if entry.subject not in WITHOUT_OPS]
every = pytest.mark.parametrize("entry", ON_OPS, ids=lambda entry: entry.id)


@pytest.fixture
def called(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ops that ran on the backend, one of them at least."""
    names: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        op = backend.op(name)
        return lambda *args, **kwargs: (names.append(name), op(*args, **kwargs))[1]

    def counted_node(name: str) -> Callable[..., object]:
        node = _derivatives.node(backend.namespace.name, name)
        return lambda *args: (names.append(name), node(*args))[1]

    for name in _ops.NAMES:
        monkeypatch.setitem(_ops.OPS, name, counted(name))
    for name in NODES:
        monkeypatch.setitem(NODES, name, counted_node(name))
    yield names
    assert names


def drawn(entry: Composition, backend: Backend, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    return leaves(entry.make(Draw(f"backend/{entry.id}", dtype, backend.device), 3))


def derivatives(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, and its first and second derivatives."""
    out = function(*args)
    first = torch.autograd.grad(out.sin().sum(), args, create_graph=True)
    total = sum(g.cos().sum() for g in first)
    return [out, *first, *torch.autograd.grad(total, args, allow_unused=True)]


@every
def test_functions_and_layers(entry: Composition, backend: Backend, called: list[str]) -> None:
    args = drawn(entry, backend)
    got, want = derivatives(entry.call, args), derivatives(entry.definition, args)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every
def test_one_pass_of_each_way(entry: Composition, backend: Backend, called: list[str]) -> None:
    """In float32: without derivatives, and with the fused backward pass."""
    args = drawn(entry, backend, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(entry.call(*args), entry.definition(*args), rtol=1e-4, atol=1e-4)
    got, want = (
        torch.autograd.grad(f(*args).sin().sum(), args) for f in (entry.call, entry.definition)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "entry",
    [entry for entry in ON_OPS if entry.subject not in PLAIN_UNDER_TRANSFORMS],
    ids=lambda entry: entry.id,
)
def test_transforms(entry: Composition, backend: Backend, called: list[str]) -> None:
    args = tuple(t.detach() for t in drawn(entry, backend))
    moved = tuple(torch.ones_like(t) for t in args)
    pair = [torch.func.jvp(f, args, moved) for f in (entry.call, entry.definition)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)
    many = tuple(torch.stack((t, 0.5 * t)) for t in args)
    pair = [torch.vmap(f)(*many) for f in (entry.call, entry.definition)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: Backend, called: list[str]) -> None:
    draw = Draw("autocast", torch.float32, backend.device)
    layer = nm.nn.ManifoldLinear(40, 24, topology=nm.Ellipse(), device=backend.device)
    x, s = draw.tensor(6, 3, 40).requires_grad_(), draw.tensor(6)
    with torch.autocast(backend.device, dtype=dtype):
        y = layer(x, s)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    want = linear(x, layer.weight, nm.Ellipse()(s), layer.bias)
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)


def trained(device: str, empirical: bool, **options: object) -> list[Tensor]:
    """The parameters of a small network after a few steps."""
    topology = nm.Bezier(2)
    net = model(topology).to(device)
    metric = EmpiricalMetric(topology, decay=0.5) if empirical else None
    optimizer = ManifoldSGD(net.parameters(), 0.02, 0.9, nesterov=True, metric=metric, **options)
    for step in range(3):
        x, s = (t.to(device) for t in batch(topology, step))
        if metric is not None:
            metric.update(s)
        optimizer.zero_grad()
        net(x, s).sin().square().sum().backward()
        optimizer.step()
    return [p.detach().cpu() for p in net.parameters()]


@pytest.mark.parametrize(
    ("empirical", "options"),
    [
        (False, {"weight_decay": 0.01}),
        (False, {"foreach": False}),
        (False, {"capturable": True}),
        (True, {}),
    ],
    ids=str,
)
def test_training(empirical: bool, options, backend: Backend, called: list[str]) -> None:
    """As with the einsums of the reference, a network's whole life."""
    got = trained(backend.device, empirical, **options)
    assert {"manifold_linear", "manifold_step_foreach_"} <= set(called)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_contraction, "EXTENSION", False)
        for name in _ops.NAMES:
            patch.setitem(_ops.OPS, name, getattr(reference, name))
        want = trained("cpu", empirical, **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_steps_in_place(backend: Backend, called: list[str]) -> None:
    draw = Draw("steps", F64, backend.device)
    P, x, g = draw.tensor(3, 4, 5), draw.tensor(6, 5), draw.tensor(6, 4)
    c, G = draw.coeff(6, 3), draw.coeff(3, 3)
    moved = P.clone()
    assert MF.natural_step_(moved, x, g, c, G, lr=0.5) is moved
    natural = MF.natural_gradient(x, g, c, G)
    torch.testing.assert_close(moved, P - 0.5 * natural)
    other, plain = P.clone(), torch.einsum("bk,bo,bi->koi", c, g, x)
    assert MF.manifold_step_(other, plain, None, G, lr=0.5) is other
    torch.testing.assert_close(other, moved)
    assert called == ["manifold_linear_update_", "manifold_linear_grad_basis", "manifold_step_"]


def test_conversion_and_folding(backend: Backend, called: list[str]) -> None:
    """A converted network, at a condition, is the plain one it folds to."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(backend.device, F64)
    net = nm.convert(plain, nm.Ellipse())
    x = Draw("fold", F64, backend.device).tensor(6, 5)
    folded = nm.fold(net, torch.tensor(0.25, dtype=F64, device=backend.device))
    s = torch.full((6,), 0.25, dtype=F64, device=backend.device)
    torch.testing.assert_close(folded(x), net(x, s))
