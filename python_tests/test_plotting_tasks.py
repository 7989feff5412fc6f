"""The figures of tasks: what they show, and what they refuse."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from neuromod_ext import analysis, plotting

NAMES = ["a", "b", "c", "d", "e"]
SIMILARITY = analysis.context_similarity(
    torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
)


def test_plot_similarity_shows_matrices_in_one_scale() -> None:
    figure = plotting.plot_similarity(
        {"before": SIMILARITY / 10, "after": SIMILARITY}, NAMES, title="Title"
    )
    before, after = figure.axes[:2]
    assert [before.get_title(), after.get_title()] == ["before", "after"]
    shown = after.images[0]
    values = shown.get_array()
    assert np.ma.getmaskarray(np.ma.masked_invalid(values)).sum() == 5  # the diagonal
    assert values[1, 3] == pytest.approx(SIMILARITY[1, 3].item())
    off = SIMILARITY[~torch.eye(5, dtype=torch.bool)].abs().max().item()
    assert shown.get_clim() == before.images[0].get_clim() == (-off, off)
    assert [tick.get_text() for tick in after.get_xticklabels()] == NAMES
    figure.draw_without_rendering()


def test_plot_similarity_leaves_names_out_where_there_is_no_room() -> None:
    names = [f"{10 * t}°" for t in range(36)]
    figure = plotting.plot_similarity({"all": torch.eye(36)}, names)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == names[::2]


def test_plot_similarity_tree_is_in_the_trees_order() -> None:
    tree = analysis.cluster_tasks(SIMILARITY)
    figure = plotting.plot_similarity_tree(SIMILARITY, tree, NAMES)
    above, below = figure.axes[:2]
    heights = sorted(max(line.get_ydata()) for line in above.get_lines())
    np.testing.assert_allclose(heights, tree.linkage[:, 2])
    assert [tick.get_text() for tick in below.get_xticklabels()] == [NAMES[t] for t in tree.order]
    first, second = tree.order[:2]
    assert below.images[0].get_array()[0, 1] == pytest.approx(SIMILARITY[first, second].item())
    assert len(below.texts) == 20
    figure.draw_without_rendering()


def test_plot_similarity_histogram_is_a_density() -> None:
    edges = torch.linspace(-1, 1, 11, dtype=torch.float64)
    counts = torch.arange(10), torch.arange(10).flip(0) * 1000
    figure = plotting.plot_similarity_histogram(
        {"one": analysis.SimilarityHistogram(edges, *counts)}
    )
    lines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    for patch, expected in zip(lines, counts, strict=True):
        values, drawn_edges, _ = patch.get_data()
        assert (values * np.diff(drawn_edges)).sum() == pytest.approx(1)
        np.testing.assert_allclose(values / values.max(), expected / expected.max())
    assert len(figure.legends[0].get_texts()) == 2
    figure.draw_without_rendering()


def test_plot_learning_shows_what_is_left() -> None:
    nan = np.nan
    matrix = [[90, nan, nan], [50, 80, nan], [40, 60, 70]]
    figure = plotting.plot_learning(["x", "y", "z"], {"one": matrix, "two": [matrix, matrix]})
    during, after = figure.axes
    for lines in (during.get_lines(), after.get_lines()):
        assert [line.get_label() for line in lines] == ["one", "two"]
    for line in during.get_lines():
        np.testing.assert_allclose(line.get_xydata(), [[1, 90], [2, 65], [3, 170 / 3]])
    for line in after.get_lines():
        np.testing.assert_allclose(line.get_ydata(), [40, 60, 70])
    figure.draw_without_rendering()


def test_plot_images_is_a_table() -> None:
    images = torch.rand(2, 3, 4, 5)
    figure = plotting.plot_images(images, ["3", "1"], ["0°", "30°", "60°"])
    assert len(figure.axes) == 6
    np.testing.assert_allclose(figure.axes[5].images[0].get_array(), images[1, 2])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["0°", "30°", "60°"]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["3", "1"]
    figure.draw_without_rendering()


TREE = analysis.cluster_tasks(SIMILARITY)
EMPTY = analysis.SimilarityHistogram(torch.linspace(-1, 1, 3), *torch.zeros(2, 2).long())
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: plotting.plot_similarity({}, NAMES), "matrices, got none"),
    (lambda: plotting.plot_similarity({"a": SIMILARITY}, NAMES[1:]), "T = 5 names, got 4"),
    (lambda: plotting.plot_similarity({"a": SIMILARITY[1:]}, NAMES), r"a of shape \[T, T\]"),
    (lambda: plotting.plot_similarity_tree(torch.eye(3), TREE, NAMES[:3]), "got one of 5"),
    (lambda: plotting.plot_similarity_histogram({}), "histograms, got none"),
    (lambda: plotting.plot_similarity_histogram({"x": EMPTY}), "pairs in 'x', got none of one"),
    (lambda: plotting.plot_learning(NAMES, {}), "1 to 6 models, got 0"),
    (lambda: plotting.plot_learning(NAMES, {"m": np.eye(4)}), r"\[5, 5\], got \[4, 4\]"),
    (lambda: plotting.plot_images(np.zeros((1, 2, 3)), ["a"], ["b"]), r"got \[1, 2, 3\]"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert str(raised.value).count("\n") == 0
