"""Modulators: each against its matrix, and the errors it states."""

import copy
import io
import math
import re

import pytest
import torch
from torch import Tensor

from neuromod_ext.nn.switch import (
    BlockDiagonal,
    Composition,
    Dense,
    Diagonal,
    Hadamard,
    Kronecker,
    LowRank,
    Modulator,
    Orthogonal,
    RotatedShift,
    ScaledPermutation,
    condition_limit,
    hadamard_transform,
    orthogonal_library,
)

N = 24
KINDS = {
    "Dense": lambda: Dense.random(N, 1),
    "Orthogonal": lambda: Orthogonal.random(N, 2),
    "Diagonal": lambda: Diagonal.random(N, 3),
    "Diagonal in rows": lambda: Diagonal.per_neuron((N // 4, 2, 2), 3),
    "Kronecker": lambda: Kronecker.random(4, 6, seed=4),
    "Kronecker of three": lambda: Kronecker.random(2, 3, 4, seed=5),
    "ScaledPermutation": lambda: ScaledPermutation.random(N, 6),
    "Hadamard": lambda: Hadamard(N, 7),
    "LowRank": lambda: LowRank.random(N, 8, rank=3),
    "BlockDiagonal": lambda: BlockDiagonal(
        Dense.random(5, 1), Hadamard(12, 1), Diagonal.random(7, 2)
    ),
    "Composition": lambda: Diagonal.random(N, 9) @ Hadamard(N, 9) @ ScaledPermutation.random(N, 1),
    "RotatedShift": lambda: RotatedShift(N, 10, 5),
}
EXACT_RANGE = set(KINDS) - {"LowRank", "Composition"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def vectors(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, N, dtype=dtype)


def test_all_maps_are_those_of_the_matrix(kind: str) -> None:
    m, w = KINDS[kind](), vectors(2, 3)
    dense = m.dense()
    torch.testing.assert_close(m(w), w @ dense.T)
    torch.testing.assert_close(m.transpose(w), w @ dense)
    torch.testing.assert_close(
        m.inverse(w), torch.linalg.solve(dense, w.flatten(0, 1).T).T.view_as(w)
    )
    assert (m.dense() - torch.eye(N)).norm() > 0.5


def test_singular_values_are_stated(kind: str) -> None:
    m = KINDS[kind]()
    values = torch.linalg.svdvals(m.dense())
    low, high = m.singular_range()
    assert low <= float(values[-1]) * (1 + 1e-12)
    assert high >= float(values[0]) * (1 - 1e-12)
    assert m.condition_number() == high / low
    if kind in EXACT_RANGE:
        assert (low, high) == pytest.approx((float(values[-1]), float(values[0])))
    assert m.condition_number() < 30 * float(values[0] / values[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trips_stay_within_the_bound(kind: str, dtype: torch.dtype) -> None:
    m, w = KINDS[kind](), vectors(50, dtype=dtype)
    assert m(w).dtype == dtype
    error, bound = m.round_trip_error(w), m.round_trip_bound(dtype)
    assert 0 <= error <= bound
    assert error > 0 or kind == "Diagonal"
    now = w
    for _ in range(20):
        now = m.inverse(m(now))
    drift = (now.double() - w.double()).norm(dim=-1) / w.double().norm(dim=-1)
    assert float(drift.max()) <= m.round_trip_bound(dtype, 20)


def test_gradients_come_back_through_the_transpose(kind: str) -> None:
    m, w, g = KINDS[kind](), vectors().requires_grad_(), vectors()
    (back,) = torch.autograd.grad(m(w), w, g)
    torch.testing.assert_close(back, m.transpose(g))
    assert torch.autograd.gradcheck(m, (w,))


def test_transforms(kind: str) -> None:
    m, w, t = KINDS[kind](), vectors(3), vectors(3)
    torch.testing.assert_close(torch.func.vmap(m)(w), m(w))
    torch.testing.assert_close(torch.func.jvp(m, (w,), (t,))[1], m(t))
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(w), m(w))


def test_a_seed_gives_the_same_modulator_and_another_seed_another(kind: str) -> None:
    first, again = KINDS[kind](), KINDS[kind]()
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize(
    "draw",
    [
        lambda s: Dense.random(5, s),
        lambda s: Orthogonal.random(5, s),
        lambda s: Diagonal.random(5, s),
        lambda s: Diagonal.per_neuron((5, 2), s),
        lambda s: Kronecker.random(2, 3, seed=s),
        lambda s: ScaledPermutation.random(50, s),
        lambda s: Hadamard(50, s),
        lambda s: LowRank.random(5, s),
    ],
)
def test_seeds_differ(draw) -> None:
    assert draw(1).seed == 1
    assert not torch.equal(draw(1).dense(), draw(2).dense())


def test_copies_and_saved_states(kind: str) -> None:
    m, w = KINDS[kind](), vectors()
    assert torch.equal(copy.deepcopy(m)(w), m(w))
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(w), m(w))
    other = KINDS[kind]()
    other.load_state_dict(m.state_dict())
    assert torch.equal(other.inverse(w), m.inverse(w))


def test_loading_another_matrix_renews_what_follows_from_it() -> None:
    m, other, w = Dense.random(N, 1), Dense.random(N, 2), vectors()
    m.load_state_dict(other.state_dict())
    assert torch.equal(m.inverse(w), other.inverse(w))
    assert m.condition_number() == other.condition_number()


def test_a_models_dtype_does_not_round_the_modulator(kind: str) -> None:
    m, w = KINDS[kind](), vectors()
    want, inverse = m(w), m.inverse(w)
    for convert in (Modulator.half, Modulator.float, Modulator.double):
        convert(m)
        assert torch.equal(m(w), want)
        assert torch.equal(m.inverse(w), inverse)


def test_autocast_does_not_round_the_weights(kind: str) -> None:
    m, w = KINDS[kind](), vectors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(m(w), m(w))
        inside = m(w)
    assert torch.equal(inside, m(w))


def test_kronecker_is_a_w_b_transposed() -> None:
    a, b, w = torch.randn(4, 4).double(), torch.randn(6, 6).double(), vectors(3)
    want = a @ w.view(3, 4, 6) @ b.T
    torch.testing.assert_close(Kronecker(a, b)(w).view(3, 4, 6), want)


def test_per_neuron_gains_are_equal_within_a_neuron() -> None:
    m = Diagonal.per_neuron((3, 2, 5), 0)
    gain = m(torch.ones(30).double()).view(3, 10)
    assert torch.equal(gain, m.gain.unsqueeze(1).expand(3, 10))
    assert m.gain.unique().numel() == 3
    with pytest.raises(ValueError, match="at least one weight in a row, got row = 0"):
        Diagonal(m.gain, row=0)


def test_powers_of_two_switch_exactly() -> None:
    gain = 2.0 ** torch.randint(-3, 4, (N,))
    m = ScaledPermutation(torch.randperm(N), gain)
    w = vectors(dtype=torch.float32)
    for _ in range(100):
        assert torch.equal(m.inverse(m(w)), w)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 100, 127, 129, 1000])
def test_hadamard_rotations_of_any_size(n: int) -> None:
    q = Hadamard(n, 0).dense()
    torch.testing.assert_close(q.T @ q, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("levels", range(15))
def test_hadamard_transform_is_sylvesters(levels: int) -> None:
    n = 2**levels
    x = torch.randn(2, n, dtype=torch.float64)
    i = torch.arange(n)
    rows = i[-3:] if n > 2 else i  # H[i, j] = (-1)^popcount(i & j), for a few i
    bits = sum((rows[:, None] & i) >> b & 1 for b in range(levels + 1))
    h = (-1.0) ** torch.as_tensor(bits, dtype=torch.float64).expand(len(rows), n)
    torch.testing.assert_close(hadamard_transform(x)[:, rows], x @ h.T)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), n * x)


@pytest.mark.parametrize("n, count", [(5, 4), (16, 5), (100, 7)])
def test_a_library_is_mutually_orthogonal(n: int, count: int) -> None:
    matrices = [torch.eye(n, dtype=torch.float64)]
    matrices += [m.dense() for m in orthogonal_library(n, count, 3)]
    rows = torch.stack(matrices).flatten(1)
    torch.testing.assert_close(rows @ rows.T, n * torch.eye(count + 1, dtype=torch.float64))


def test_shifts_add_up() -> None:
    w = vectors()
    torch.testing.assert_close(
        RotatedShift(N, 1, 2)(RotatedShift(N, 1, 3)(w)), RotatedShift(N, 1, 5)(w)
    )
    torch.testing.assert_close(RotatedShift(N, 1, 0)(w), w)


def test_compositions_apply_in_order() -> None:
    a, b, w = Dense.random(N, 1), Diagonal.random(N, 2), vectors()
    torch.testing.assert_close(Composition(a, b)(w), b(a(w)))
    torch.testing.assert_close((a @ b)(w), a(b(w)))


def test_the_condition_limit_follows_the_dtype() -> None:
    assert condition_limit(torch.float32) == 4096
    assert condition_limit(torch.bfloat16) == 16
    m = Diagonal(torch.tensor([1.0, 5000.0]))
    m.check(torch.float64)
    message = (
        "Diagonal: expected a condition number of at most 4.1e+03 for weights of float32, got 5e"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        m.check(torch.float32)


EYE = torch.eye(3)
SINGULAR = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
BAD = {
    "singular": (
        lambda: Dense(SINGULAR),
        ValueError,
        "expected a condition number of at most 9.5e",
    ),
    "ill-conditioned": (lambda: Dense(torch.tensor([1, 1e-9]).diag()), ValueError, "got 1e+09"),
    "not square": (
        lambda: Dense(torch.ones(2, 3)),
        ValueError,
        "Dense: expected matrix to be square, got shape [2, 3]",
    ),
    "vector": (lambda: Dense(torch.ones(2)), ValueError, "expected matrix of 2 dimensions"),
    "empty": (lambda: Dense(torch.ones(0, 0)), ValueError, "to be square, got shape [0, 0]"),
    "nan": (lambda: Dense(EYE * math.nan), ValueError, "Dense: expected matrix to be finite"),
    "integers": (
        lambda: Dense(torch.eye(2).long()),
        TypeError,
        "to be a floating-point Tensor, got torch.int64",
    ),
    "list": (
        lambda: Orthogonal([[1.0]]),
        TypeError,
        "Orthogonal: expected matrix to be a floating-point Tensor, got list",
    ),
    "not orthogonal": (
        lambda: Orthogonal(EYE * 1.001),
        ValueError,
        "Orthogonal: expected matrix.T @ matrix to be 1",
    ),
    "rounded": (
        lambda: Orthogonal(Orthogonal.random(9, 0).matrix.float()),
        ValueError,
        "orthonormalise it in float64",
    ),
    "zero gain": (
        lambda: Diagonal(torch.tensor([1.0, 0.0])),
        ValueError,
        "Diagonal: expected a condition number of at most 9.5e+07 for weights of float64, got inf",
    ),
    "gains": (
        lambda: Diagonal.random(3, 0, low=-1.0),
        ValueError,
        "expected gains with 0 < low <= high",
    ),
    "no factor": (
        lambda: Kronecker(),
        ValueError,
        "Kronecker: expected at least one weight, got 0",
    ),
    "singular factor": (
        lambda: Kronecker(EYE, SINGULAR),
        ValueError,
        "Kronecker: expected a condition number",
    ),
    "twice": (
        lambda: ScaledPermutation(torch.tensor([0, 0, 1])),
        ValueError,
        "expected permutation to hold each of 0 to n - 1 once",
    ),
    "float permutation": (
        lambda: ScaledPermutation(torch.ones(2)),
        TypeError,
        "expected permutation to be a Tensor of int64",
    ),
    "short gain": (
        lambda: ScaledPermutation(torch.arange(3), torch.ones(2)),
        ValueError,
        "expected gain of shape [n] = [3], got [2]",
    ),
    "ranks": (
        lambda: LowRank(torch.ones(3), torch.ones(3, 2), torch.ones(3, 1)),
        ValueError,
        "LowRank: expected right of shape [n, r] = [3, 2], got [3, 1]",
    ),
    "no inverse": (
        lambda: LowRank(torch.ones(2), -EYE[:2, :1], EYE[:2, :1]),
        ValueError,
        "LowRank: expected a condition number",
    ),
    "no block": (
        lambda: BlockDiagonal(),
        ValueError,
        "BlockDiagonal: expected at least one weight",
    ),
    "sizes": (
        lambda: Composition(Hadamard(2, 0), Hadamard(3, 0)),
        ValueError,
        "modulators of one size, got sizes [2, 3]",
    ),
    "no weights": (
        lambda: Hadamard(0, 0),
        ValueError,
        "Hadamard: expected at least one weight, got 0",
    ),
    "library": (
        lambda: orthogonal_library(4, 4, 0),
        ValueError,
        "expected count from 1 to n - 1 = 3, got 4",
    ),
    "wrong length": (
        lambda: Hadamard(4, 0)(torch.ones(3)),
        ValueError,
        "Hadamard: expected weights of shape [..., 4], got [3]",
    ),
    "scalar": (
        lambda: Hadamard(1, 0)(torch.ones(())),
        ValueError,
        "expected weights of shape [..., 1], got []",
    ),
    "integer weights": (
        lambda: Hadamard(4, 0).inverse(torch.ones(4).long()),
        TypeError,
        "expected weights of dtype float64, float32",
    ),
    "no tensor": (
        lambda: Hadamard(2, 0)([1.0, 2.0]),
        TypeError,
        "expected weights to be a Tensor, got list",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_overwriting_yields_the_same(kind: str, dtype: torch.dtype) -> None:
    m, w = KINDS[kind](), vectors(1, dtype=dtype)[0]
    for inverse in (False, True):
        want = m.inverse(w) if inverse else m(w)
        for sizes in ([N], [4, N - 4]):
            parts = [part.clone() for part in w.split(sizes)]
            m.overwrite([parts[0].view(2, -1), *parts[1:]], inverse)
            assert torch.equal(torch.cat(parts), want)
    with pytest.raises(ValueError, match=f"expected {m.size} weights to overwrite, got {N - 1}"):
        m.overwrite([w[1:]])


def test_a_state_dict_holds_all_of_a_modulator() -> None:
    """Another seed or shift loads as the map that was saved, and says so."""
    w = torch.randn(9, dtype=torch.float64)
    for saved, other in (
        (RotatedShift(9, 1, steps=2), RotatedShift(9, 7, steps=5)),
        (Hadamard(9, 2**64 - 1), Hadamard(9, 0)),
        (Diagonal(torch.rand(9) + 1), Diagonal.random(9, 3)),
    ):
        assert not torch.equal(saved(w), other(w))
        other.load_state_dict(saved.state_dict())
        assert torch.equal(saved(w), other(w))
        assert other.seed == saved.seed
        assert repr(other) == repr(saved)
