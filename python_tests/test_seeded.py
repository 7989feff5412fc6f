"""Seeded arrays: the same bits everywhere, and the distributions they claim."""

import hashlib
import math

import numpy as np
import pytest

from neuromod_ext._seeded import Seeded, _log, _sum

# Digests of the first numbers of seed 7, written down once: another machine must find the same.
DIGESTS = {
    "bits": "a62f5f59b109d8b6",
    "uniform": "9e9e223dfd7707ff",
    "signs": "2417745b718a8091",
    "permutation": "c7e371ed4e1da7b0",
    "normal": "c51e923d3d984db2",
    "orthogonal": "76c31b6bfea627c8",
}


def digest(values: np.ndarray) -> str:
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("kind", DIGESTS)
def test_bits_are_those_written_down(kind: str) -> None:
    n = 20 if kind == "orthogonal" else 1000
    assert digest(getattr(Seeded(7), kind)(n)) == DIGESTS[kind]


def test_draws_follow_one_another_and_streams_differ() -> None:
    one, other = Seeded(3), Seeded(3)
    whole = one.bits(10)
    assert (np.concatenate((other.bits(4), other.bits(6))) == whole).all()
    for different in (Seeded(4), Seeded(3, stream=1)):
        assert (different.bits(10) != whole).all()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, None, True])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(ValueError, match="Seeded: expected seed from 0 to"):
        Seeded(seed)  # type: ignore[arg-type]


def test_log_is_the_logarithm() -> None:
    x = np.concatenate((Seeded(0).uniform(10_000) + 1e-12, [1e-300, 0.5, 1.0, 2.0**-53, 1e300]))
    np.testing.assert_allclose(_log(x), np.log(x), rtol=4e-16, atol=4e-16)


def test_sum_is_the_sum() -> None:
    for n in (1, 2, 3, 7, 64, 100):
        terms = Seeded(n).normal(3 * n).reshape(n, 3)
        np.testing.assert_allclose(_sum(terms), terms.sum(0), atol=1e-12)


def test_normal_numbers_are_normal() -> None:
    """By moments: each within five standard errors."""
    z, n = Seeded(5).normal(200_000), 200_000
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n)
    inside = (np.abs(z) < 1).mean()
    assert abs(inside - 0.682689) < 5 * math.sqrt(0.22 / n)
    assert Seeded(5).normal(0).size == 0


def test_signs_uniform_numbers_and_permutations() -> None:
    n = 100_000
    signs, u, p = Seeded(1).signs(n), Seeded(1).uniform(n), Seeded(1).permutation(n)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(signs.mean()) < 5 / math.sqrt(n)
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert sorted(p.tolist()) == list(range(n))
    assert abs(np.corrcoef(p, np.arange(n))[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_orthogonal(n: int) -> None:
    q = Seeded(2).orthogonal(n)
    np.testing.assert_allclose(q.T @ q, np.eye(n), atol=1e-14 * n)


def test_orthogonal_matrices_have_no_preferred_direction() -> None:
    """Entries have mean 0 and variance 1/n, those of the first and of the last column alike."""
    n, draws = 4, 2000
    q = np.stack([Seeded(s).orthogonal(n) for s in range(draws)])
    assert (np.abs(q.mean(0)) < 5 / math.sqrt(n * draws)).all()
    assert (np.abs((q**2).mean(0) - 1 / n) < 5 * math.sqrt(2 / n**2 / draws)).all()
