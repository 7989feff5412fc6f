"""manifold_metric and natural_gradient: closed forms, sums in float64, the dual basis."""

import pytest
import torch
from sampling import DTYPES, Draw, wide

import neuromod_ext as nm
import neuromod_ext.functional as MF

TOPOLOGIES = [
    nm.Line(),
    nm.Bezier(3),
    nm.Ellipse(),
    nm.Fourier(3),
    nm.Torus(),
    nm.Cylinder(),
    nm.Sphere(),
    nm.Simplex(4),
    nm.PiecewiseLinear(5),
    nm.Spline(6, closed=True),
    nm.Discrete(4),
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=repr)
def test_quadrature_gives_the_gram_matrix(topology) -> None:
    nodes, weights = topology.quadrature()
    c = topology(nodes).double()
    torch.testing.assert_close(MF.manifold_metric(c, weights), topology.gram())


def test_the_mean_over_samples() -> None:
    c = Draw("mean").coeff(100, 4)
    want = torch.stack([torch.outer(row, row) for row in c]).mean(0)
    torch.testing.assert_close(MF.manifold_metric(c), want)
    torch.testing.assert_close(MF.manifold_metric(c, torch.full((100,), 0.01, dtype=c.dtype)), want)


def test_sums_run_in_float64() -> None:
    """A float32 sum of these would lose the small ones."""
    c = torch.ones(20_001, 1)
    c[0] = 2.0**14
    assert MF.manifold_metric(c, torch.ones(20_001)).item() == float(torch.tensor(2.0**28 + 20_000))
    c = torch.full((1 << 16, 1), 0.1)
    exact = float(c[0].double() ** 2)
    assert abs(MF.manifold_metric(c).item() - exact) <= exact * 2**-24


def test_signed_weights_and_none_at_all() -> None:
    c = Draw("signed").coeff(5, 3)
    w = torch.tensor([1.0, -1, 0, 2, -3], dtype=torch.float64)
    torch.testing.assert_close(MF.manifold_metric(c, w), c.T @ w.diag() @ c)
    assert not MF.manifold_metric(c[:0], w[:0]).any()  # a sum of nothing
    with pytest.raises(
        ValueError, match=r"expected coeff of at least one condition \(N >= 1\), got N = 0"
    ):
        MF.manifold_metric(c[:0])


def test_symmetric_to_the_bit_without_weights() -> None:
    for dtype in (torch.float32, torch.float64):
        G = MF.manifold_metric(Draw("symmetric", dtype).coeff(300, 7))
        assert torch.equal(G, G.T)


# natural_gradient


@pytest.mark.parametrize("middle", [(), (2,), (2, 3)])
@pytest.mark.parametrize("topology", TOPOLOGIES[:5], ids=repr)
def test_natural_gradient_mixes_the_gradient(topology, middle) -> None:
    """G^-1 on the gradient that autograd finds, for the cost of the gradient itself."""
    K = topology.num_basis
    d = Draw(f"natural/{K}")
    x, c, g = (
        d.tensor(6, *middle, 4),
        topology(topology.sample(6, dtype=torch.float64)),
        d.tensor(6, *middle, 3),
    )
    P = d.tensor(K, 3, 4).requires_grad_()
    MF.manifold_linear(x, P, c).backward(g)
    inverse = topology.gram_inverse()
    torch.testing.assert_close(
        MF.natural_gradient(x, g, c, inverse), torch.tensordot(inverse, P.grad, 1)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_natural_gradient_dtype(dtype) -> None:
    d = Draw("dtype", dtype)
    out = MF.natural_gradient(
        d.tensor(5, 4), d.tensor(5, 3), d.coeff(5, 3), torch.eye(3, dtype=wide(dtype))
    )
    assert (out.dtype, out.shape) == (dtype, (3, 3, 4))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"input": None},
            TypeError,
            "natural_gradient: expected input to be a Tensor, got NoneType",
        ),
        (
            {"grad_output": 1},
            TypeError,
            "natural_gradient: expected grad_output to be a Tensor, got int",
        ),
        (
            {"metric_inverse": 1.0},
            TypeError,
            "natural_gradient: expected metric_inverse to be a Tensor, got float",
        ),
        (
            {"coeff": torch.ones(3)},
            ValueError,
            "natural_gradient: expected coeff of shape [B, K], got [3]",
        ),
        (
            {"metric_inverse": torch.eye(2)},
            ValueError,
            "natural_gradient: expected metric_inverse of shape [K, K] = [3, 3], got [2, 2]",
        ),
        (
            {"metric_inverse": torch.ones(3)},
            ValueError,
            "natural_gradient: expected metric_inverse of shape [K, K] = [3, 3], got [3]",
        ),
        (
            {"metric_inverse": torch.eye(3).double()},
            TypeError,
            "expected metric_inverse of dtype float32 (that of coeff), got float64; convert one of",
        ),
        (
            {"metric_inverse": torch.eye(3, device="meta")},
            ValueError,
            "expected metric_inverse on cpu (where coeff is), got meta; move one of them",
        ),
        (
            {"input": torch.ones(5, 4).double()},
            TypeError,
            "natural_gradient: expected input of dtype float32 (that of grad_output), got float64",
        ),
        (
            {"input": torch.ones(4, 4)},
            ValueError,
            "natural_gradient: expected input of shape [B, ..., I] = [5, 4], got [4, 4]",
        ),
        (
            {"grad_output": torch.ones(5, 2, 3)},
            ValueError,
            "natural_gradient: expected input of shape [B, ..., I] = [5, 2, 4], got [5, 4]",
        ),
        (
            {"coeff": torch.ones(4, 3)},
            ValueError,
            "natural_gradient: expected coeff of shape [B, K] = [5, 3], got [4, 3]",
        ),
    ],
)
def test_natural_gradient_bad_calls(change, error, words) -> None:
    good = {
        "input": torch.ones(5, 4),
        "grad_output": torch.ones(5, 3),
        "coeff": torch.ones(5, 3),
        "metric_inverse": torch.eye(3),
    }
    MF.natural_gradient(**good)
    with pytest.raises(error) as caught:
        MF.natural_gradient(**good | change)
    assert words in str(caught.value)
