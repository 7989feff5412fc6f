"""manifold_linear beside torch.nn.functional.linear, and what its arguments may be."""

import pytest
import torch
from bounds import UNIT
from sampling import DTYPES, Draw
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

import neuromod_ext.functional as MF


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("middle", [(), (4,), (2, 3)])
@pytest.mark.parametrize("samples", [1, 5])
def test_one_basis_point_is_torch_linear(dtype, middle, samples) -> None:
    d = Draw(f"one/{middle}/{samples}", dtype)
    x, W, b = d.tensor(samples, *middle, 7), d.tensor(6, 7), d.tensor(6)
    c = torch.ones(samples, 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ours = [t.clone().requires_grad_() for t in (x, W[None], b[None])]
    theirs = [t.clone().requires_grad_() for t in (x, W, b)]
    out = MF.manifold_linear(ours[0], ours[1], c, ours[2])
    want = F.linear(*theirs)
    assert (out.shape, out.dtype) == (want.shape, want.dtype)
    g = d.tensor(*want.shape)
    out.backward(g)
    want.backward(g)
    magnitude = float(F.linear(x.abs().double(), W.abs().double(), b.abs().double()).max())
    torch.testing.assert_close(out, want, rtol=0, atol=8 * UNIT[dtype] * magnitude)
    for t, u in zip(ours, theirs, strict=True):
        assert t.grad.dtype == dtype
        size = float(u.grad.abs().max()) + magnitude * samples
        torch.testing.assert_close(
            t.grad.view(u.shape), u.grad, rtol=0, atol=16 * UNIT[dtype] * size
        )


@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 2, 7), (2, 1, 3, 7), (0, 7)])
@pytest.mark.parametrize("coeff_shape", [(3,), (1, 3)])
def test_one_condition(shape, coeff_shape) -> None:
    """[K] and [1, K] fold the weight first; input has any shape [..., I]."""
    d = Draw(f"fold/{shape}")
    x, P, c, b = d.tensor(*shape), d.tensor(3, 6, 7), d.coeff(*coeff_shape), d.tensor(3, 6)
    W, shift = torch.tensordot(c.view(3), P, 1), c.view(3) @ b
    torch.testing.assert_close(MF.manifold_linear(x, P, c, b), F.linear(x, W, shift))
    torch.testing.assert_close(MF.manifold_linear(x, P, c), F.linear(x, W))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 200])
def test_one_condition_of_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    """Few rows go through the op, many through torch's own product; values and gradients agree."""
    d = Draw(f"rows/{rows}", dtype)
    operands = [d.tensor(rows, 9), d.tensor(3, 6, 9), d.coeff(3), d.tensor(3, 6)]
    ours = [t.clone().requires_grad_() for t in operands]
    exact = [t.double().requires_grad_() for t in operands]
    out = MF.manifold_linear(*ours)
    x, P, c, b = exact
    want = F.linear(x, torch.tensordot(c, P, 1), c @ b)
    g = d.tensor(rows, 6)
    out.backward(g)
    want.backward(g.double())
    for got, expected in (
        (out, want),
        *((t.grad, u.grad) for t, u in zip(ours, exact, strict=True)),
    ):
        size = float(expected.abs().max())
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=8 * UNIT[dtype] * (size + 9 * rows**0.5)
        )


def test_one_condition_equals_many_that_are_equal() -> None:
    d = Draw("expand")
    x, P, c, b = d.tensor(5, 2, 7), d.tensor(3, 6, 7), d.coeff(3), d.tensor(3, 6)
    torch.testing.assert_close(
        MF.manifold_linear(x, P, c, b), MF.manifold_linear(x, P, c.expand(5, 3), b)
    )


def test_samples_share_the_condition_with_their_tokens() -> None:
    d = Draw("tokens")
    x, P, c, b = d.tensor(4, 2, 3, 7), d.tensor(3, 6, 7), d.coeff(4, 3), d.tensor(3, 6)
    each = [MF.manifold_linear(x[i], P, c[i], b) for i in range(4)]
    torch.testing.assert_close(MF.manifold_linear(x, P, c, b), torch.stack(each))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((0, 3, 6, 7), (0, 6)),
        ((4, 3, 0, 7), (4, 0)),
        ((4, 3, 6, 0), (4, 6)),
        ((4, 1, 0, 0), (4, 0)),
    ],
)
def test_empty(sizes, shape) -> None:
    B, K, O, I = sizes
    d = Draw("empty")
    inputs = [d.tensor(B, I), d.tensor(K, O, I), d.coeff(B, K), d.tensor(K, O)]
    for t in inputs:
        t.requires_grad_()
    out = MF.manifold_linear(*inputs)
    assert out.shape == shape
    out.sum().backward()
    assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]
    torch.testing.assert_close(out, inputs[2] @ inputs[3] if out.numel() else torch.empty_like(out))


@pytest.mark.parametrize("sizes", [(2, 3, 0, 5), (0, 3, 2, 5), (0, 0, 2, 5), (2, 3, 2, 0)])
def test_empty_under_vmap(sizes) -> None:
    basis, coeff = torch.randn(3, 4, sizes[-1]), torch.randn(sizes[1], 3)

    def call(x: Tensor) -> Tensor:
        return MF.manifold_linear(x, basis, coeff)

    x = torch.randn(sizes)
    out = vmap(call)(x)
    assert out.shape == (*sizes[:-1], 4)
    assert out.count_nonzero() == 0
    assert vmap(grad(lambda x: call(x).sum()))(x).shape == x.shape


def test_no_array_of_every_basis_points_output() -> None:
    """Neither a weight for each sample nor an output for each basis point is ever stored."""
    B, K, O, I = 512, 16, 64, 64
    d = Draw("memory", torch.float32)
    args = [d.tensor(B, I), d.tensor(K, O, I), d.coeff(B, K)]
    for t in args:
        t.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        MF.manifold_linear(*args).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.key_averages())
    assert 0 < largest < 4 * B * K * O


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": [1.0]}, TypeError, "expected input to be a Tensor, got list"),
        ({"basis": None}, TypeError, "expected basis to be a Tensor, got NoneType"),
        ({"coeff": 1.0}, TypeError, "expected coeff to be a Tensor, got float"),
        (
            {"coeff": torch.ones(5)},
            ValueError,
            r"expected coeff of shape \[B, K\] = \[1, 3\], got \[1, 5\]",
        ),
        ({"coeff": torch.ones(())}, ValueError, r"expected coeff of shape \[B, K\], got \[\]"),
        (
            {"coeff": torch.ones(4, 3, 1)},
            ValueError,
            r"expected coeff of shape \[B, K\], got \[4, 3, 1\]",
        ),
        ({"coeff": torch.ones(2, 3)}, ValueError, r"= \[4, 3\], got \[2, 3\]"),
        ({"input": torch.ones(())}, ValueError, r"expected input of shape \[B, ..., I\], got \[\]"),
        (
            {"input": torch.ones(4, 6), "coeff": torch.ones(3)},
            ValueError,
            r"expected input of shape",
        ),
        (
            {"bias": torch.ones(6)},
            ValueError,
            r"expected bias of shape \[K, O\] = \[3, 6\], got \[6\]",
        ),
        (
            {"bias": torch.ones(3, 6).double(), "coeff": torch.ones(3)},
            TypeError,
            "expected bias of dtype float32",
        ),
    ],
)
def test_bad_calls(change, error, words) -> None:
    good = {"input": torch.ones(4, 7), "basis": torch.ones(3, 6, 7), "coeff": torch.ones(4, 3)}
    MF.manifold_linear(**good)
    with pytest.raises(error, match=f"manifold_linear: .*{words}"):
        MF.manifold_linear(**good | change)
