"""Conditioned: how the condition reaches nested layers, and when it must not."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import neuromod_ext as nm
from neuromod_ext import Conditioned
from neuromod_ext.nn import ManifoldConv2d, ManifoldLinear


class Net(nn.Module):
    def __init__(self, topology: nm.Topology, rerun: str = "no") -> None:
        super().__init__()
        self.rerun = rerun
        self.context_fn = None
        self.body = nn.Sequential(
            ManifoldConv2d(1, 2, 3, topology=topology), nn.ReLU(), nn.Flatten()
        )
        self.head = ManifoldLinear(8, 3, topology=topology)

    def forward(self, x, scale=1.0, *, shift=0.0):
        if self.rerun == "no":
            h = self.body(x)
        elif self.rerun == "with contexts":
            h = checkpoint(self.body, x, use_reentrant=False, context_fn=self.context_fn)
        else:
            h = checkpoint(self.body, x, use_reentrant=False)
        return self.head(h) * scale + shift


def by_hand(net: Net, x, s):
    h = net.body[0](x, s).relu().flatten(1)
    return net.head(h, s)


def data(n: int = 5):
    return torch.randn(n, 1, 4, 4), torch.rand(n)


def test_every_layer_gets_the_condition() -> None:
    net = Net(nm.Ellipse())
    model, (x, s) = Conditioned(net), data()
    torch.testing.assert_close(model(x, s), by_hand(net, x, s))
    torch.testing.assert_close(model(x, coeff=nm.Ellipse()(s)), by_hand(net, x, s))
    torch.testing.assert_close(model(x, 0.3), by_hand(net, x, torch.full((5,), 0.3)))
    torch.testing.assert_close(model(x, s, 2.0, shift=1.0), by_hand(net, x, s) * 2 + 1)


def test_a_layers_own_condition_goes_first() -> None:
    layer = ManifoldLinear(3, 2, topology=nm.Line())

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, 0.25)

    x = torch.randn(5, 3)
    assert torch.equal(Conditioned(Fixed())(x, torch.rand(5)), layer(x, 0.25))


def test_topologies_may_differ() -> None:
    net = nn.Sequential(
        ManifoldLinear(3, 4, topology=nm.Line()), ManifoldLinear(4, 2, topology=nm.Ellipse())
    )
    x, s = torch.randn(5, 3), torch.rand(5)
    torch.testing.assert_close(Conditioned(net)(x, s), net[1](net[0](x, s), s))


def test_coefficients_are_computed_once_for_equal_topologies() -> None:
    calls = []

    def function(s):
        calls.append(len(s))
        return torch.stack((1 - s, s), -1)

    topology = nm.Custom(function, 2)
    model = Conditioned(nn.Sequential(*(ManifoldLinear(3, 3, topology=topology) for _ in range(4))))
    calls.clear()
    model(torch.randn(5, 3), torch.rand(5))
    assert calls == [5]


def test_layers_of_different_dtypes() -> None:
    """Coefficients are converted for each layer, whichever came first."""
    for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        first, second = (ManifoldLinear(3, 3, topology=nm.Line(), dtype=dtype) for dtype in dtypes)

        class Mixed(nn.Module):
            def __init__(self, first=first, second=second) -> None:
                super().__init__()
                self.first, self.second = first, second

            def forward(self, x):
                return self.second(
                    self.first(x.to(self.first.weight.dtype)).to(self.second.weight.dtype)
                )

        x, s = torch.randn(5, 3), torch.rand(5, dtype=torch.float64)
        want = second(first(x.to(dtypes[0]), s).to(dtypes[1]), s)
        torch.testing.assert_close(Conditioned(Mixed())(x, s), want)


def test_nothing_is_left_behind() -> None:
    net = Net(nm.Line())
    model, (x, s) = Conditioned(net), data()
    model(x, s)
    assert net.head.ambient_coeff is None
    with pytest.raises(ValueError, match="expected a condition, got none"):
        net(x)
    for bad in (torch.full((5,), 2.0), torch.rand(4)):
        with pytest.raises(ValueError):
            model(x, bad)
        assert net.head.ambient_coeff is net.body[0].ambient_coeff is None
    torch.testing.assert_close(model(x, s), by_hand(net, x, s))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: m(x), "Conditioned: expected either s or coeff, got neither"),
        (
            lambda m, x: m(x, 0.5, coeff=torch.ones(2)),
            "Conditioned: expected either s or coeff, got both",
        ),
        (
            lambda m, x: Conditioned(nn.Linear(2, 2))(x, 0.5),
            "Conditioned: expected a model with a manifold layer, got none",
        ),
        (lambda m, x: m(x, -1.0), r"Line: expected s in \[0, 1\]"),
        (
            lambda m, x: m(x, torch.rand(3)),
            r"expected coeff of shape \[B, K\] = \[5, 2\], got \[3, 2\]",
        ),
        (
            lambda m, x: m(x, coeff=torch.rand(5, 3)),
            r"expected coeff of shape \[B, K\] = \[5, 2\], got \[5, 3\]",
        ),
    ],
)
def test_bad_calls(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call(Conditioned(Net(nm.Line())), data()[0])


def test_threads_in_one_model_are_refused() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ManifoldLinear(3, 2, topology=nm.Line())

        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert go_on.wait(30)
            return self.layer(x)

    model, x, s, results = Conditioned(Waiting()), torch.randn(5, 3), torch.rand(5), []
    thread = threading.Thread(target=lambda: results.append(model(x, s)))
    thread.start()
    assert inside.wait(30)
    with pytest.raises(
        RuntimeError, match=r"expected layers that no other call is using.*copy of the model"
    ):
        model(x, 1 - s)
    copied = copy.deepcopy(model.module.layer)
    copied.ambient_coeff = None
    go_on.set()
    thread.join()
    assert torch.equal(results[0], model.module.layer(x, s))
    assert torch.equal(model(x, 1 - s), model.module.layer(x, 1 - s))


def test_conditioned_inside_conditioned_is_refused() -> None:
    model = Conditioned(nn.Sequential(Conditioned(ManifoldLinear(3, 3, topology=nm.Line()))))
    with pytest.raises((RuntimeError, ValueError), match="Conditioned: expected"):
        model(torch.randn(5, 3), torch.rand(5))


# Checkpointing


def gradients(model: nn.Module, x, s):
    model.zero_grad()
    model(x, s).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_checkpointing_with_contexts() -> None:
    net = Net(nm.Ellipse())
    model, (x, s) = Conditioned(net), data()
    want = gradients(model, x, s)
    net.rerun, net.context_fn = "with contexts", model.checkpoint_contexts
    for got, expected in zip(gradients(model, x, s), want, strict=True):
        assert torch.equal(got, expected)
    assert net.head.ambient_coeff is None


def test_two_calls_then_backward_each_with_its_condition() -> None:
    net = Net(nm.Ellipse())
    model, (x, s) = Conditioned(net), data()
    want = [
        torch.autograd.grad(model(x, t).square().sum(), list(model.parameters()))
        for t in (s, 1 - s)
    ]
    net.rerun, net.context_fn = "with contexts", model.checkpoint_contexts
    first, second = model(x, s).square().sum(), model(x, 1 - s).square().sum()
    for loss, expected in ((first, want[0]), (second, want[1])):
        for got, g in zip(
            torch.autograd.grad(loss, list(model.parameters())), expected, strict=True
        ):
            assert torch.equal(got, g)


def test_a_gradient_reaches_the_condition_through_a_checkpoint() -> None:
    net = Net(nm.Ellipse())
    model, (x, s) = Conditioned(net), data()
    s.requires_grad_()
    (want,) = torch.autograd.grad(model(x, s).square().sum(), s)
    net.rerun, net.context_fn = "with contexts", model.checkpoint_contexts
    (got,) = torch.autograd.grad(model(x, s).square().sum(), s)
    assert torch.equal(got, want)


def test_checkpointing_without_contexts_raises() -> None:
    net = Net(nm.Ellipse(), rerun="without")
    model, (x, s) = Conditioned(net), data()
    loss = model(x, s).sum()
    with pytest.raises(
        ValueError, match="under activation checkpointing, with its checkpoint_contexts"
    ):
        loss.backward()


# Transforms of a whole model


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic) -> None:
    model = Conditioned(Net(nm.Ellipse()))
    run = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (5, 7):
        x, s = data(n)
        want = gradients(model, x, s)
        for got, expected in zip(gradients(run, x, s), want, strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(run(x, s), model(x, s))
    assert model.module.head.ambient_coeff is None


def test_per_sample_gradients() -> None:
    model, (x, s) = Conditioned(Net(nm.Ellipse())), data()
    parameters = dict(model.named_parameters())

    def loss(parameters, x, s):
        return torch.func.functional_call(model, parameters, (x[None], s[None])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, s)
    for i in range(len(x)):
        gradients(model, x[i : i + 1], s[i : i + 1])
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad)


def test_data_parallel_copies_do_not_share_conditions() -> None:
    model, (x, s) = Conditioned(Net(nm.Ellipse())), data(6)
    copies = [copy.deepcopy(model) for _ in range(3)]
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = copies[i](x[2 * i : 2 * i + 2], s[2 * i : 2 * i + 2])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([results[i] for i in range(3)]), model(x, s))


def test_of_two_threads_one_is_refused() -> None:
    """Nothing in between: no thread computes under the other's condition."""
    model = nm.convert(nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]), nm.Fourier(4))
    x, conditions = torch.randn(64, 16), [torch.rand(64), torch.rand(64)]
    with torch.no_grad():
        wanted = [model(x, s) for s in conditions]
    both, outcomes = threading.Barrier(2), []

    @torch.no_grad()
    def call(i: int) -> None:
        for _ in range(100):
            both.wait()
            try:
                outcomes.append(torch.allclose(model(x, conditions[i]), wanted[i], atol=1e-5))
            except RuntimeError as error:
                outcomes.append("no other call is using" in str(error))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 200 and all(outcomes)


def test_each_dtype_has_its_coefficients() -> None:
    """A float32 layer of the same topology comes first; the condition is a number of Python's."""
    net = nn.ModuleList([nm.nn.ManifoldLinear(1, 1, topology=nm.Ellipse(), dtype=dtype)
                         for dtype in (torch.float32, torch.float64)])  # fmt: skip

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net

        def forward(self, x):
            return self.layers[0](x.float()), self.layers[1](x)

    x = torch.randn(3, 1, dtype=torch.float64)
    want = net[1](x, torch.tensor(0.3, dtype=torch.float64))
    assert torch.equal(nm.Conditioned(Both())(x, 0.3)[1], want)
    assert torch.equal(net[1](x, 0.3), want)
