"""The switch paper's experiments: the batched runs are the library's, and a tiny run of each."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.papers import gates, switch_mnist
from benchmarks.papers.__main__ import main
from benchmarks.papers.report import Interval
from neuromod_ext.nn import switch as library

AND, XOR = gates.GATES["AND"], gates.GATES["XOR"]


def one_network(runs: gates.Runs, r: int) -> nn.Sequential:
    """Run r as an ordinary model."""
    layers: list[nn.Module] = []
    for shape in runs.sizes.shapes:
        layers += [nn.Linear(shape[1], shape[0], dtype=torch.float64), nn.ReLU()]
    net = nn.Sequential(*layers[:-1], nn.Sigmoid())
    nn.utils.vector_to_parameters(runs.w[r], [p for p in net.parameters() if p.dim() > 1])
    nn.utils.vector_to_parameters(runs.b[r], [p for p in net.parameters() if p.dim() == 1])
    return net


def flat(net: nn.Module) -> Tensor:
    parameters = list(net.parameters())
    parts = [p for p in parameters if p.dim() > 1] + [p for p in parameters if p.dim() == 1]
    return torch.cat([p.detach().flatten() for p in parts])


@pytest.mark.parametrize("scheme", ["alternating", "joint"])
@pytest.mark.parametrize("sizes", [gates.two_layers(3), gates.four_layers(2)], ids=str)
def test_a_row_of_the_batch_is_the_librarys_co_optimise(sizes: gates.Sizes, scheme) -> None:
    runs = gates.Runs.start(sizes, 3, seed=5)
    switch = gates.Switch.draw("dense", sizes, 3, seed=5)
    nets = [one_network(runs, r) for r in range(3)]
    cycles = list(
        gates.co_optimise(runs, switch, (AND, XOR), period=4, cycles=3, lr=0.5, scheme=scheme)
    )
    if scheme == "joint":
        assert torch.equal(cycles[-1].path[-1], cycles[-1].parameters[0])
    else:
        assert cycles[-1].path.shape == (8, sizes.weights + sizes.biases)
    for r, net in enumerate(nets):
        m = library.Dense.random(sizes.weights, 5 + r)
        switchable = library.Switchable(net, m, shift=switch.v[r])
        tasks = [
            lambda network, gate=gate: [F.mse_loss(network(gates.INPUTS).squeeze(1), gate)]
            for gate in (AND, XOR)
        ]
        losses = []
        library.co_optimise(
            switchable,
            tasks,
            torch.optim.SGD(switchable.parameters(), lr=0.5),
            period=4,
            cycles=3,
            scheme=scheme,
            callback=lambda epoch, losses=losses: losses.append(epoch.losses[0]),
        )
        torch.testing.assert_close(flat(switchable.module), cycles[-1].parameters[r])
        seen = torch.stack([c.losses[:, :, r] for c in cycles])
        seen = seen.sum(1).flatten() if scheme == "joint" else seen.flatten()
        torch.testing.assert_close(seen, torch.tensor(losses, dtype=torch.float64))
        for state, gate in enumerate((AND, XOR)):
            share = (switchable(gates.INPUTS, state).squeeze(1).round() == gate).double().mean()
            assert float(cycles[-1].right[state, r]) == float(share)


def test_runs_do_not_depend_on_their_number() -> None:
    few, many = (gates.Runs.start(gates.two_layers(4), n) for n in (2, 5))
    for runs in (few, many):
        for _ in gates.train(runs, XOR, 20, 0.5):
            pass
    torch.testing.assert_close(few.parameters(), many.parameters()[:2])


def test_starts_are_those_of_torch_in_distribution() -> None:
    runs = gates.Runs.start(gates.two_layers(4), 400)
    first, second = runs.w[:, :8], runs.w[:, 8:]
    assert float(first.abs().max()) <= 2**-0.5 < 1.05 * float(first.abs().max())
    assert float(second.abs().max()) <= 0.5 < 1.05 * float(second.abs().max())
    assert abs(float(runs.w.mean())) < 0.05


def test_the_path_is_where_the_network_was_trained() -> None:
    runs = gates.Runs.start(gates.two_layers(3), 2)
    switch = gates.Switch.draw("orthogonal", runs.sizes, 2)
    (cycle,) = gates.co_optimise(runs, switch, (AND, XOR), period=2, cycles=1, lr=0.5)
    n = runs.sizes.weights
    torch.testing.assert_close((switch.inverse[0] @ cycle.path[-1, :n]), runs.w[0])
    torch.testing.assert_close(cycle.path[-1, n:] - switch.v[0], runs.b[0])
    assert float((cycle.path[2] - cycle.path[1]).norm()) > 0.5


TINY = ["--starts", "6", "--cycles", "4", "--epochs", "6"]


@pytest.mark.parametrize("part", ["map", "and-or", "and-xor"])
def test_a_tiny_run(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["switch", "--part", part, *TINY, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"switch-{part}.json").read_text())
    assert record["config"]["starts"] == 6
    assert str(tmp_path / f"switch-{part}-figure.png") in capsys.readouterr().out
    from matplotlib.image import imread

    pixels = imread(tmp_path / f"switch-{part}-figure.png")
    assert 0.005 < (pixels[..., :3].min(2) < 0.9).mean() < 0.5
    if part == "map":
        two = record["networks"]["two layers"]
        assert np.array(two["components"]["XOR"]).shape == (6, 3)
        assert len(two["distances"]["AND"]["cosine"]) == 15
        assert len(two["distances"]["AND to OR"]["cosine"]) == 36
        return
    settings = record["settings"]
    expected = 9 if part == "and-or" else 24
    assert len(settings) == expected
    for numbers in settings:
        assert len(numbers["success_by_cycle"]) == 4
        assert np.array(numbers["peak_after_switch"]["median_by_cycle"]).shape == (4, 2)
        assert numbers["success"]["low_95"] <= numbers["success"]["rate"]
        assert numbers["success"]["runs"] == 6
    if part == "and-or":
        assert [n["period"] for n in settings[:3]] == [3, 10, 30]


def test_a_tiny_run_on_digits(tmp_path: Path) -> None:
    options = ["--hidden", "3", "6", "--seeds", "2", "--epochs", "2", "--train-images", "400"]
    assert main(["switch-classes", *options, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "switch-classes-digits.json").read_text())
    assert [(run["model"], run["hidden"]) for run in record["runs"]] == [
        *(("extra input", 3), ("switch", 3), ("extra input", 6), ("switch", 6))
    ]
    for run in record["runs"]:
        assert np.array(run["accuracy_by_seed_and_task"]).shape == (2, 2)
        assert 10 < np.mean(run["accuracy_by_seed_and_task"]) < 100
    switch, extra = (record["summary"][0]["parameters"][m] for m in ("switch", "extra input"))
    assert extra - switch == 9 * switch_mnist.CHANNELS[0]
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch) -> None:
    options = ["switch-classes", "--seeds", "2", "--epochs", "1", "--train-images", "200"]
    options += ["--hidden", "3", "5"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    learn, sizes = switch_mnist.SwitchedDigits._learn, []

    def interrupted(self, model, hidden, tasks):
        if len(sizes) == 3:
            raise KeyboardInterrupt
        sizes.append(hidden)
        return learn(self, model, hidden, tasks)

    broken = [*options, "--out", str(tmp_path / "broken")]
    monkeypatch.setattr(switch_mnist.SwitchedDigits, "_learn", interrupted)
    assert main(broken) == 130
    del sizes[:2]  # lets it learn the last network, and no other one
    assert main(broken) == 0
    assert sizes == [5, 5]
    whole, again = (
        json.loads((tmp_path / name / "switch-classes-digits.json").read_text())["runs"]
        for name in ("whole", "broken")
    )
    for run in (*whole, *again):
        del run["seconds"]
    assert whole == again


def test_curves_cross_where_intervals_say_so() -> None:
    def rows(*differences: tuple[float, float]):
        return [
            {"parameters": {"switch": 10**i}, switch_mnist.DIFFERENCE: Interval(*map(np.array, d))}
            for i, d in enumerate(differences)
        ]

    cross = switch_mnist.crossings
    assert cross(rows((2, 1), (-0.5, 1), (0.5, 1), (-2, 1))) == [{"above": 1, "below": 1000}]
    assert cross(rows((2, 1), (-0.5, 1), (2, 1))) == []
    assert len(cross(rows((-2, 1), (2, 1), (-3, 1)))) == 2


def test_a_row_of_the_networks_is_an_ordinary_cnn_switched() -> None:
    nets = switch_mnist.Networks("switch", 12, 4, 2, 0.1)
    x = torch.randn(7, 1, 12, 12)
    rows = switch_mnist.patches(x).expand(4, -1, -1, -1)
    got = nets(rows)
    for seed in range(2):
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 20, 3, 2, 1), nn.ReLU(),
            nn.Flatten(2), nn.Linear(9, 9), nn.Flatten(), nn.Linear(180, 4), nn.ReLU(),
            nn.Linear(4, 5),
        )  # fmt: skip
        net[5] = nn.Identity()
        at = library.layout(net)
        # the batched network flattens pixels first, channels last
        w = nets.w[seed].detach().clone()
        m = library.Hadamard(at.num_weights, seed)
        for state, vector in ((0, w), (1, m(w))):
            first, second, third, fourth = vector.split([o * i for o, i in nets.shapes])
            b = nets.b[seed].detach() + state * nets.v[seed]
            with torch.no_grad():
                net[0].weight.copy_(first.view(8, 1, 3, 3))
                net[2].weight.copy_(second.view(20, 8, 3, 3))
                net[7].weight.copy_(third.view(4, 9, 20).transpose(1, 2).reshape(4, 180))
                net[9].weight.copy_(fourth.view(5, 4))
                for layer, bias in zip((0, 2, 7, 9), b.split([8, 20, 4, 5]), strict=True):
                    net[layer].bias.copy_(bias)
            torch.testing.assert_close(got[state * 2 + seed], net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--starts", "0"], "--starts: expected at least 1, got 0"),
        (["--lr", "nan"], "--lr: expected a number above 0, got nan"),
        (["--part", "map", "--starts", "1"], "--starts: expected at least 2 with map, got 1"),
    ],
)
def test_bad_options(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["switch", "--out", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
