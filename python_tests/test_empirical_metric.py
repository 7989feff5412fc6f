"""EmpiricalMetric: its average, its limit, and how an optimizer uses it."""

import pytest
import torch

import neuromod_ext as nm
from neuromod_ext.optim import EmpiricalMetric, ManifoldSGD

F64 = torch.float64


def test_the_empirical_metric_converges_to_the_closed_form() -> None:
    topology = nm.Bezier(2)
    metric = EmpiricalMetric(topology, decay=0.9, damping=0.0)
    nodes = torch.linspace(0, 1, 20_001, dtype=F64)
    for part in nodes[torch.randperm(len(nodes))].chunk(10):
        metric.update(part)
    torch.testing.assert_close(metric.gram(), topology.gram(), rtol=0.05, atol=0.01)
    whole = EmpiricalMetric(topology, decay=0.0, damping=0.0)
    whole.update(coeff=topology(nodes))
    torch.testing.assert_close(whole.gram(), topology.gram(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.inverse(), topology.gram_inverse(), rtol=5e-3, atol=1e-2)


def test_the_running_average() -> None:
    metric, beta = EmpiricalMetric(nm.Line(), decay=0.75, damping=0.1), 0.75
    grams, want = [], torch.zeros(2, 2, dtype=F64)
    for seed in range(4):
        s = nm.Line().sample(5, generator=torch.Generator().manual_seed(seed), dtype=F64)
        metric.update(s)
        c = nm.Line()(s)
        grams.append(c.T @ c / 5)
        want = beta * want + (1 - beta) * grams[-1]
        torch.testing.assert_close(metric.gram(), want / (1 - beta ** (seed + 1)))
    G = metric.gram()
    damped = G + 0.1 * G.trace() / 2 * torch.eye(2, dtype=F64)
    torch.testing.assert_close(metric.inverse(), damped.inverse())


def test_an_optimizer_uses_it_for_its_topology_only() -> None:
    line, other = (
        nm.nn.ManifoldLinear(1, 1, False, topology=nm.Line()),
        nm.nn.ManifoldLinear(1, 1, False, topology=nm.Ellipse()),
    )
    metric = EmpiricalMetric(nm.Line(), decay=0.0, damping=0.0)
    optimizer = ManifoldSGD([line.weight, other.weight], 1.0, metric=metric)
    with torch.no_grad():
        line.weight.zero_(), other.weight.zero_()
    line.weight.grad, other.weight.grad = (
        torch.ones_like(line.weight),
        torch.ones_like(other.weight),
    )
    with pytest.raises(RuntimeError, match="expected update"):
        optimizer.step()
    assert not line.weight.any()
    s = torch.tensor([0.0, 0.0, 0.0, 1.0])
    metric.update(s)  # G = diag(3/4, 1/4)
    optimizer.step()
    torch.testing.assert_close(line.weight.flatten(), torch.tensor([-4 / 3, -4.0]))
    torch.testing.assert_close(other.weight.flatten(), torch.tensor([-1.0, -2.0, -2.0]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: EmpiricalMetric(nm.Line(), decay=1.0),
            ValueError,
            r"expected decay in \[0, 1\), got 1.0",
        ),
        (
            lambda: EmpiricalMetric(nm.Line(), decay=-0.1),
            ValueError,
            r"expected decay in \[0, 1\), got -0.1",
        ),
        (
            lambda: EmpiricalMetric(nm.Line(), damping=-1.0),
            ValueError,
            "expected damping >= 0 and finite, got -1.0",
        ),
        (
            lambda: EmpiricalMetric(nm.Line(), damping=float("nan")),
            ValueError,
            "expected damping >= 0 and finite, got nan",
        ),
        (
            lambda: EmpiricalMetric(nm.Line()).update(),
            ValueError,
            "expected either s or coeff, got neither",
        ),
        (
            lambda: EmpiricalMetric(nm.Line()).update(torch.ones(2), coeff=torch.ones(2, 2)),
            ValueError,
            "got both",
        ),
        (
            lambda: EmpiricalMetric(nm.Line()).update(torch.ones(0)),
            ValueError,
            "at least one condition",
        ),
        (
            lambda: EmpiricalMetric(nm.Line()).update(coeff=torch.ones(4, 1)),
            ValueError,
            r"coeff of shape \[B, K\] = \[B, 2\], got \[4, 1\]",
        ),
        (
            lambda: EmpiricalMetric(nm.Line()).update(torch.tensor([2.0])),
            ValueError,
            "Line: expected s",
        ),
        (lambda: EmpiricalMetric(nm.Line()).gram(), RuntimeError, "got no condition"),
        (lambda: singular().inverse(), ValueError, "singular metric; raise damping above 0.0"),
        (
            lambda: EmpiricalMetric(nm.Line()).load_state_dict(
                EmpiricalMetric(nm.Ellipse()).state_dict()
            ),
            ValueError,
            r"expected an average of shape \[2, 2\], got \[3, 3\]",
        ),
    ],
)
def test_empirical_metric_bad_calls(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()


def singular() -> EmpiricalMetric:
    metric = EmpiricalMetric(nm.Line(), damping=0.0)
    metric.update(torch.zeros(3))
    return metric
