"""The figures: what they show, and what they say without matplotlib."""

import sys

import numpy as np
import pytest
import torch

import neuromod_ext as nm
from neuromod_ext import plotting


def test_plot_accuracy_closes_the_circle() -> None:
    degrees = [0.0, 90.0, 180.0, 270.0]
    curves = {"one": ([80, 90, 80, 70], [1, 1, 1, 1]), "two": ([50, 60, 50, 60], [np.nan] * 4)}
    figure = plotting.plot_accuracy(degrees, curves, [0, 180], title="Title")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["one"].get_xdata(), [0, 90, 180, 270, 360])
    np.testing.assert_array_equal(lines["one"].get_ydata(), [80, 90, 80, 70, 80])
    assert "seen in training" in lines
    assert axes.get_xlabel() == "angle of rotation (°)"
    assert axes.get_ylabel() == "test accuracy (%)"
    assert axes.get_ylim()[0] <= 48
    figure.draw_without_rendering()


def test_plot_accuracy_refuses_too_many() -> None:
    curves = {str(i): ([1.0], [1.0]) for i in range(7)}
    with pytest.raises(ValueError, match="expected at most 6 curves, got 7"):
        plotting.plot_accuracy([0.0], curves, [])


@pytest.mark.parametrize("topology", [nm.Ellipse(), nm.Line(), nm.Spline(5, closed=True)])
def test_plot_manifold_path_draws_every_curve(topology: nm.Topology) -> None:
    snapshots = {e: torch.randn(topology.num_basis, 4, 1, 3, 3) for e in (0, 1, 8)}
    figure = plotting.plot_manifold_path(snapshots, topology, marks={"a": 0.0, "b": 0.25})
    axes = figure.axes[0]
    curves = [line for line in axes.get_lines() if line.get_label() in ("0", "1", "8")]
    assert len(curves) == 3
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    ends = curves[0].get_xydata()[[0, -1]]
    closed = getattr(topology, "closed", False)
    assert np.allclose(*ends, atol=1e-5) == closed
    figure.draw_without_rendering()


def test_plot_manifold_path_refuses() -> None:
    with pytest.raises(ValueError, match="got 0 snapshots"):
        plotting.plot_manifold_path({}, nm.Ellipse())
    with pytest.raises(ValueError, match="whose conditions are numbers, got 1 snapshots and Torus"):
        plotting.plot_manifold_path({0: torch.zeros(9, 2)}, nm.Torus())


def test_principal_components_find_a_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(20, 2, generator=generator)).Q
    inside = torch.randn(50, 2, generator=generator) * torch.tensor([3.0, 1.0])
    projected, share = plotting.principal_components(inside @ directions.T + 7, 2)
    assert share.sum().item() == pytest.approx(1)
    assert share[0] > share[1]
    torch.testing.assert_close(
        torch.pdist(projected), torch.pdist(inside).double(), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="expected n from 1 to 20, got 21"):
        plotting.principal_components(inside @ directions.T, 21)


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install neuromod_ext\[papers\]"):
        plotting.plot_accuracy([0.0], {}, [])
