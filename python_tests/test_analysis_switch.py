"""Distances, peaks and intervals of the switch experiments."""

import math

import pytest
import torch
from scipy import stats

from neuromod_ext.analysis.switch import (
    nearest_distance,
    pair_distances,
    success_interval,
    switch_peaks,
)


def test_distances_between_and_within() -> None:
    one, other = torch.randn(4, 7).double(), torch.randn(3, 7).double()
    found = pair_distances(one, other)
    for i in range(4):
        for j in range(3):
            cosine = 1 - torch.nn.functional.cosine_similarity(one[i], other[j], dim=0)
            torch.testing.assert_close(found.cosine[3 * i + j], cosine)
            torch.testing.assert_close(found.euclidean[3 * i + j], (one[i] - other[j]).norm())
    torch.testing.assert_close(pair_distances(one).euclidean, torch.pdist(one))
    assert pair_distances(one).cosine.shape == (6,)
    torch.testing.assert_close(nearest_distance(one, other), torch.cdist(one, other).amin(1))
    with pytest.raises(ValueError, match=r"got \[4, 7\] and \[3, 6\]"):
        pair_distances(one, other[:, :6])


def test_peaks_are_the_largest_losses_of_a_period() -> None:
    losses = torch.rand(5, 2, 3, 4)
    peaks = switch_peaks(losses)
    assert peaks.shape == (5, 2, 4)
    assert float(peaks[3, 1, 2]) == max(losses[3, 1, :, 2].tolist())
    for bad in (losses[0, 0], losses[:, :, :0]):
        with pytest.raises(ValueError, match="switch_peaks: expected losses of shape"):
            switch_peaks(bad)


@pytest.mark.parametrize(("successes", "runs"), [(0, 10), (3, 10), (30, 100), (100, 100)])
def test_wilsons_interval(successes: int, runs: int) -> None:
    want = stats.binomtest(successes, runs).proportion_ci(method="wilson")
    assert success_interval(successes, runs) == pytest.approx((want.low, want.high), abs=1e-6)


def test_bad_counts() -> None:
    for successes, runs in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= successes <= runs"):
            success_interval(successes, runs)
    assert not math.isnan(success_interval(1, 1)[0])
