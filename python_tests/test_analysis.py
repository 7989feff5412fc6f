"""The analysis of modulated networks against naive computations."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from neuromod_ext import analysis

T, C, D = 4, 3, 17


def points(sizes: list[list[int]]) -> list[list[Tensor]]:
    """Of each task and class, [n, D]; each task and each class pulls its points its own way."""
    generator = torch.Generator().manual_seed(1)
    of_task, of_class = torch.randn(2, 5, D, generator=generator)
    return [
        [
            1.5 * of_task[t] + of_class[c] + torch.randn(n, D, generator=generator)
            for c, n in enumerate(row)
        ]
        for t, row in enumerate(sizes)
    ]


UNEVEN = [[3, 1, 4], [2, 2, 0], [5, 1, 1], [2, 3, 2]]


def taken_in(cells: list[list[Tensor]], parts: int = 2) -> analysis.PairSimilarity:
    pairs = analysis.PairSimilarity(len(cells), len(cells[0]))
    for t, row in enumerate(cells):
        label = torch.tensor([c for c, z in enumerate(row) for _ in z], dtype=torch.int64)
        order = torch.randperm(len(label))
        for chosen in order.chunk(parts):
            pairs.update(torch.cat(row)[chosen], t, label[chosen])
    return pairs


def naive(cells: list[list[Tensor]]) -> tuple[list[float], list[float]]:
    """Similarities of all intra and of all inter pairs, one by one."""
    flat = [(t, c, z) for t, row in enumerate(cells) for c, zs in enumerate(row) for z in zs]
    intra, inter = [], []
    for i, (t, c, z) in enumerate(flat):
        for u, d, w in flat[:i]:
            cosine = float(F.cosine_similarity(z.double(), w.double(), dim=0))
            if t == u and c != d:
                intra.append(cosine)
            if t != u and c == d:
                inter.append(cosine)
    return intra, inter


def test_context_similarity_is_the_cosine() -> None:
    gains = torch.randn(6, 50)
    found = analysis.context_similarity(gains)
    for t in range(6):
        for u in range(6):
            expected = F.cosine_similarity(gains[t].double(), gains[u].double(), dim=0)
            assert found[t, u] == pytest.approx(expected.item(), abs=1e-12)
    assert analysis.context_similarity(torch.zeros(2, 3)).isnan().all()
    torch.testing.assert_close(analysis.context_similarity(-3 * gains), found)


def test_neighbour_share() -> None:
    phases = torch.arange(8) * math.tau / 8
    ring = torch.stack((phases.cos(), phases.sin()), 1)
    near = analysis.context_similarity(ring + 1e-3 * torch.randn(8, 2))
    assert analysis.neighbour_share(near) == 1
    assert analysis.neighbour_share(near[:5, :5], closed=False) == 1
    swapped = near[[0, 4, 2, 3, 1, 5, 6, 7]][:, [0, 4, 2, 3, 1, 5, 6, 7]]
    assert analysis.neighbour_share(swapped) < 1
    # The first and the last are alike: neighbours only in a closed order.
    pair = torch.eye(5)
    pair[0, 4] = pair[4, 0] = 0.9
    difference = analysis.neighbour_share(pair) - analysis.neighbour_share(pair, closed=False)
    assert difference == pytest.approx(2 / 5)


def test_mantel_test_finds_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(12, 4, generator=generator)
    found = analysis.context_similarity(gains)
    noisy = analysis.context_similarity(gains + 0.3 * torch.randn(12, 4, generator=generator))
    same = analysis.mantel_test(found, found, permutations=99)
    assert same == (pytest.approx(1), pytest.approx(0.01))
    related = analysis.mantel_test(found, noisy, permutations=199)
    rows = np.triu_indices(12, 1)
    expected = np.corrcoef(found.numpy()[rows], noisy.numpy()[rows])[0, 1]
    assert related.correlation == pytest.approx(expected)
    assert related.p_value == pytest.approx(1 / 200)
    chance = [
        analysis.mantel_test(
            analysis.context_similarity(torch.randn(8, 3, generator=generator)),
            analysis.context_similarity(torch.randn(8, 3, generator=generator)),
            permutations=99,
        ).p_value
        for _ in range(100)
    ]
    assert 0.01 <= np.mean(np.array(chance) <= 0.1) <= 0.2  # 10 % expected: 6 to 17 of 100
    assert 0.4 <= np.mean(chance) <= 0.6


def test_pair_similarity_is_the_mean_over_all_pairs() -> None:
    cells = points(UNEVEN)
    pairs = taken_in(cells)
    intra, inter = naive(cells)
    score = pairs.score()
    assert score.intra == pytest.approx(np.mean(intra), abs=1e-12)
    assert score.inter == pytest.approx(np.mean(inter), abs=1e-12)
    assert score.score == pytest.approx(score.intra - score.inter, abs=1e-12)
    only = [[z if t == 2 else z[:0] for z in row] for t, row in enumerate(cells)]
    assert pairs.intra()[2].item() == pytest.approx(np.mean(naive(only)[0]), abs=1e-12)
    two = [[z if t in (0, 3) else z[:0] for z in row] for t, row in enumerate(cells)]
    assert pairs.inter()[0, 3].item() == pytest.approx(np.mean(naive(two)[1]), abs=1e-12)
    assert pairs.inter().diagonal().isnan().all()


def test_cells_of_pair_similarity() -> None:
    cells = points(UNEVEN)
    found = taken_in(cells).cells()
    for t, u in ((0, 0), (0, 1), (3, 2)):
        for c, d in ((0, 0), (1, 1), (0, 2)):
            cosine = (
                F.normalize(cells[t][c].double(), dim=1)
                @ F.normalize(cells[u][d].double(), dim=1).mT
            )
            if (t, c) == (u, d):
                cosine = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
            expected = cosine.mean().item()  # NaN where there is no pair
            assert found[t, c, u, d].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_score_is_the_jackknife_over_tasks() -> None:
    cells = points(UNEVEN)
    without = []
    for t in range(T):
        intra, inter = naive([row for u, row in enumerate(cells) if u != t])
        without.append(np.mean(intra) - np.mean(inter))
    found = taken_in(cells).score()
    pseudo = T * found.score - (T - 1) * np.array(without)
    from scipy import stats

    expected = stats.ttest_1samp(pseudo, 0, alternative="greater")
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    half = stats.t.ppf(0.975, T - 1) * pseudo.std(ddof=1) / math.sqrt(T)
    assert found.half_width == pytest.approx(half, rel=1e-6)


def test_score_errs_as_often_as_it_says() -> None:
    """Tasks and classes that count alike, so that every finding is a false alarm: 5 % of 100.

    A t-test that takes pairs, or points, for independent gives 40 to 45 alarms here.
    """
    generator = torch.Generator().manual_seed(0)
    tasks, classes, each, width = 12, 12, 4, 400
    alarms = 0
    for _ in range(100):
        of_task = torch.randn(tasks, 1, 1, width, generator=generator)
        of_class = torch.randn(1, classes, 1, width, generator=generator)
        z = of_task + of_class + torch.randn(tasks, classes, each, width, generator=generator)
        pairs = analysis.PairSimilarity(tasks, classes)
        label = torch.arange(classes).repeat_interleave(each)
        for t in range(tasks):
            pairs.update(z[t].flatten(0, 1), t, label)
        alarms += pairs.score().p_value < 0.05
    assert 1 <= alarms <= 14


def test_zero_points_are_left_out() -> None:
    cells = points(UNEVEN)
    extended = [[torch.cat((z, torch.zeros(2, D))) for z in row] for row in cells]
    found = taken_in(extended)
    assert found.left_out == 2 * T * C
    assert found.score() == pytest.approx(taken_in(cells).score())
    histograms = [
        analysis.similarity_histogram(lambda t, c, z=z: z[t][c], range(T), range(C))
        for z in (cells, extended)
    ]
    for plain, with_zeros in zip(*histograms, strict=True):
        assert torch.equal(plain, with_zeros)


@pytest.mark.parametrize("scale", [1e-14, 1e-30, 1e25])
def test_similarities_do_not_depend_on_the_length_of_points(scale: float) -> None:
    cells = points(UNEVEN)
    scaled = [[(z * scale).float() for z in row] for row in cells]
    assert taken_in(scaled).score() == pytest.approx(taken_in(cells).score(), rel=1e-5)
    found, want = (
        analysis.similarity_histogram(lambda t, c, z=z: z[t][c], range(T), range(C), bins=8)
        for z in (scaled, [[z.float() for z in row] for row in cells])
    )
    assert (found.intra - want.intra).abs().max() <= 2  # at the edge of a bin
    assert (found.inter - want.inter).abs().max() <= 2


@pytest.mark.parametrize("cells_at_once", [1, 2, 100])
def test_similarity_histogram_counts_every_pair(cells_at_once: int) -> None:
    cells = points(UNEVEN)
    found = analysis.similarity_histogram(
        lambda t, c: cells[t][c], range(T), range(C), bins=20, cells_at_once=cells_at_once
    )
    for counts, values in zip((found.intra, found.inter), naive(cells), strict=True):
        expected, edges = np.histogram(values, 20, (-1, 1))
        np.testing.assert_array_equal(counts, expected)
        np.testing.assert_allclose(found.edges, edges, atol=1e-12)


def test_separation_is_a_probability_of_order() -> None:
    edges = torch.linspace(-1, 1, 5)

    def separation(intra: list[int], inter: list[int]) -> float:
        counts = torch.tensor(intra), torch.tensor(inter)
        return analysis.SimilarityHistogram(edges, *counts).separation()

    assert separation([0, 0, 0, 5], [1, 2, 0, 0]) == 1
    assert separation([7, 0, 0, 0], [0, 2, 3, 9]) == 0
    assert separation([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(0.5)
    assert separation([1, 1, 0, 0], [0, 2, 0, 0]) == pytest.approx(0.25)


def hash_index(hidden: int, inputs: int, each: int) -> Tensor:
    return torch.stack([torch.randperm(inputs)[:each] for _ in range(hidden)])


@pytest.mark.parametrize("hidden, inputs", [(60, 12), (12, 12), (8, 30)])
def test_reconstruct_is_the_pseudo_inverse(hidden: int, inputs: int) -> None:
    index = hash_index(hidden, inputs, 5)
    dense = torch.zeros(hidden, inputs, dtype=torch.float64)
    for row, ones in enumerate(index):
        dense[row, ones] = 1
    prototypes, gains = torch.randn(3, hidden), torch.randn(4, hidden)
    found = analysis.reconstruct(index, inputs, prototypes, gains, noise=0)
    assert found.shape == (4, 3, inputs)
    inverse = np.linalg.pinv(dense.numpy())
    for t in range(4):
        for c in range(3):
            expected = inverse @ (prototypes[c].double() * gains[t].double()).numpy()
            np.testing.assert_allclose(found[t, c], expected, atol=1e-9)


def test_reconstruct_gives_back_an_input() -> None:
    index, x = hash_index(400, 30, 7), torch.rand(30, dtype=torch.float64)
    seen = x[index].sum(1)  # what the hash makes of x, without its ReLU
    args = (index, 30, torch.ones(1, 400), seen.unsqueeze(0))
    torch.testing.assert_close(analysis.reconstruct(*args, noise=0)[0, 0], x)
    drawn = [
        analysis.reconstruct(*args, generator=torch.Generator().manual_seed(s))[0, 0] - x
        for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    dense = torch.zeros(400, 30, dtype=torch.float64).scatter_(1, index, 1.0)
    spread = torch.linalg.pinv(dense).norm() / math.sqrt(400)  # of E |S+ e|^2, its root
    assert 0.5 < drawn[0].norm() / spread < 1.5


def test_cluster_tasks_is_average_linkage() -> None:
    similarity = torch.full((5, 5), 0.1)
    similarity[0, 3] = similarity[3, 0] = 0.9
    similarity[1, 4] = similarity[4, 1] = 0.7
    for a in (0, 3):
        for b in (1, 4):
            similarity[a, b] = similarity[b, a] = 0.4
    similarity.fill_diagonal_(1)
    tree = analysis.cluster_tasks(similarity)
    np.testing.assert_allclose(tree.linkage[:, 2], [0.1, 0.3, 0.6, 0.9], atol=1e-6)
    np.testing.assert_array_equal(tree.linkage[:, 3], [2, 2, 4, 5])
    assert tree.groups(2) == [[0, 1, 3, 4], [2]]
    assert tree.groups(3) == [[0, 3], [1, 4], [2]]
    assert tree.groups(5) == [[0], [1], [2], [3], [4]]
    assert tree.groups(1) == [[0, 1, 2, 3, 4]]
    assert sorted(tree.order) == [0, 1, 2, 3, 4]
    assert abs(tree.order.index(0) - tree.order.index(3)) == 1


EYE = torch.eye(4)
INFINITE = torch.zeros(4, 4)
INFINITE[0, 3] = INFINITE[3, 0] = torch.inf
INDEX = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 3]])
PAIRS = analysis.PairSimilarity


def cell(task: int, label: int) -> Tensor:
    return torch.ones(2, 3)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: analysis.context_similarity([1.0]), TypeError, "gains to be a Tensor, got list"),
    (lambda: analysis.context_similarity(torch.ones(3)), ValueError, r"\[T, D\], got \[3\]"),
    (lambda: analysis.context_similarity(INDEX), TypeError, "bfloat16 or float16, got int64"),
    (lambda: analysis.neighbour_share(EYE[:3]), ValueError, r"T >= 2, got \[3, 4\]"),
    (lambda: analysis.neighbour_share(EYE * torch.nan), ValueError, "got non-finite entries"),
    (lambda: analysis.neighbour_share(EYE + EYE[[1, 2, 3, 0]]), ValueError, "another transpose"),
    (lambda: analysis.mantel_test(EYE, EYE[:3, :3]), ValueError, "three or more tasks, got 4 and"),
    (lambda: analysis.mantel_test(EYE, EYE, permutations=0), ValueError, "at least 1, got 0"),
    (lambda: PAIRS(1, 2), ValueError, "tasks of at least 2, got 1"),
    (lambda: PAIRS(2, 1), ValueError, "classes of at least 2, got 1"),
    (lambda: PAIRS(3, 2).score(), ValueError, "points, got none yet"),
    (lambda: PAIRS(2, 4).score(), ValueError, "at least 3 tasks, got 2"),
    (lambda: PAIRS(3, 4).update(EYE, 3, torch.arange(4)), ValueError, "task from 0 to 2, got 3"),
    (lambda: PAIRS(3, 3).update(EYE, 0, torch.arange(4)), ValueError, "C - 1 = 2, got 0 to 3"),
    (lambda: PAIRS(3, 4).update(EYE, 0, torch.arange(3)), ValueError, r"\[N\] = \[4\], got \[3\]"),
    (lambda: PAIRS(3, 4).update(EYE, 0, torch.ones(4)), TypeError, "int64, got float32"),
    (lambda: taken_in(points([[1, 1]] * 2 + [[0, 0]])).score(), ValueError, "got too few"),
    (lambda: taken_in(points(UNEVEN)).update(EYE, 0, torch.zeros(4).long()), ValueError, "N, 17"),
    (lambda: analysis.similarity_histogram(cell, [0], [0, 1]), ValueError, "least 2, got 1"),
    (lambda: analysis.similarity_histogram(cell, [0, 1], [0, 1], bins=0), ValueError, "got 0"),
    (
        lambda: analysis.similarity_histogram(lambda t, c: EYE * np.nan, [0, 1], [0, 1]),
        ValueError,
        "finite",
    ),
    (lambda: analysis.mantel_test(EYE + INFINITE, EYE), ValueError, "got non-finite entries"),
    (lambda: analysis.neighbour_share(EYE + INFINITE), ValueError, "got non-finite entries"),
    (lambda: analysis.similarity_histogram(lambda t, c: 1, [0, 1], [0, 1]), TypeError, "got int"),
    (lambda: analysis.reconstruct(INDEX, 3, EYE, EYE), ValueError, "I - 1 = 2, got 0 to 3"),
    (lambda: analysis.reconstruct(INDEX[[0, 0]] * 0, 3, EYE, EYE), ValueError, "H = 2 columns"),
    (lambda: analysis.reconstruct(INDEX * 0, 3, EYE, EYE), ValueError, "two alike in row 0"),
    (lambda: analysis.reconstruct(INDEX.short(), 4, EYE, EYE), TypeError, "int64, got int16"),
    (lambda: analysis.reconstruct(INDEX, 4, EYE, EYE, noise=-1), ValueError, ">= 0 and finite"),
    (lambda: analysis.cluster_tasks(EYE, method="ward"), ValueError, "got 'ward'"),
    (lambda: analysis.cluster_tasks(2 * EYE + 2), ValueError, "at most 1, got 4"),
    (lambda: analysis.cluster_tasks(EYE).groups(5), ValueError, "count from 1 to 4, got 5"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_calls(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert ": expected " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "call", [lambda: analysis.cluster_tasks(EYE), lambda: taken_in(points(UNEVEN)).score()]
)
def test_without_scipy_the_error_names_the_remedy(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("scipy", "scipy.stats", "scipy.cluster.hierarchy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"expected scipy, got none; pip install neuromod_ext\["):
        call()
