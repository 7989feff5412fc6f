"""interpolate_weights: shapes, one condition, and the gradient's dtype."""

import pytest
import torch
from sampling import DTYPES, Draw, wide
from test_manifold_linear_backward import Calls
from torch import Tensor

import neuromod_ext.functional as MF


@pytest.mark.parametrize("rest", [(), (5,), (5, 4), (2, 3, 4, 5)])
def test_shapes(rest) -> None:
    d = Draw(f"shapes/{rest}")
    P, c = d.tensor(3, *rest), d.coeff(7, 3)
    out = MF.interpolate_weights(P, c)
    assert out.shape == (7, *rest)
    torch.testing.assert_close(out, torch.tensordot(c, P, 1))
    one = MF.interpolate_weights(P, c[2])
    assert one.shape == rest
    assert torch.equal(one, out[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vertex_is_its_basis_point(dtype) -> None:
    P = Draw("vertex", dtype).tensor(4, 3, 5)
    assert torch.equal(MF.interpolate_weights(P, torch.eye(4, dtype=wide(dtype))), P)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [1, 40])
def test_every_half_number(dtype, samples) -> None:
    """Each number, times any coefficient, is rounded as torch rounds it; 40 weights fill 5 MB."""
    P = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    c = Draw(f"halves/{samples}", dtype).coeff(samples, 1)
    want = (c * P.float()).to(dtype)
    out = MF.interpolate_weights(P[None], c)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_their_operands_dtype(dtype) -> None:
    d = Draw("dtype", dtype)
    P, c = d.tensor(3, 6).requires_grad_(), d.coeff(4, 3).requires_grad_()
    out = MF.interpolate_weights(P, c)
    out.sum().backward()
    assert (out.dtype, P.grad.dtype, c.grad.dtype) == (dtype, dtype, wide(dtype))


@pytest.mark.parametrize(("samples", "rest"), [(0, (5,)), (4, (0,)), (0, (0,)), (4, (2, 0, 3))])
def test_empty(samples, rest) -> None:
    d = Draw("empty")
    P, c = d.tensor(3, *rest).requires_grad_(), d.coeff(samples, 3).requires_grad_()
    out = MF.interpolate_weights(P, c)
    assert out.shape == (samples, *rest)
    out.sum().backward()
    assert not P.grad.any()
    assert not c.grad.any()


def test_one_op_yields_the_gradients() -> None:
    """Unless they are to be differentiated in turn: then each is an op that can be."""
    d = Draw("both")
    P, c, g = d.tensor(3, 6).requires_grad_(), d.coeff(4, 3).requires_grad_(), d.tensor(4, 6)
    separate = ["interpolate_weights_grad_basis", "interpolate_weights_grad_coeff"]

    def gradients(P: Tensor, c: Tensor, **options: bool) -> tuple[tuple[Tensor, ...], list[str]]:
        out, leaves = MF.interpolate_weights(P, c), [t for t in (P, c) if t.requires_grad]
        with Calls() as calls:
            return torch.autograd.grad(out, leaves, g, **options), calls.names

    fused, names = gradients(P, c)
    assert names == ["interpolate_weights_backward"]
    differentiable, names = gradients(P, c, create_graph=True)
    assert names == separate
    assert all(t.grad_fn for t in differentiable)
    for got, want in zip(fused, differentiable, strict=True):
        torch.testing.assert_close(got, want)
    for leaves in ((P, c.detach()), (P.detach(), c)):
        (one,), names = gradients(*leaves)
        assert names == ["interpolate_weights_backward"]
        torch.testing.assert_close(one, fused[leaves[1].requires_grad])
    outputs = torch.ops.neuromod_ext.interpolate_weights_backward(g, P, c, [True, True])
    with pytest.raises(NotImplementedError, match="no derivative of this op to be asked for; diff"):
        outputs[0].sum().backward()


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((1.0, torch.ones(3)), TypeError, "basis to be a Tensor, got float"),
        ((torch.ones(3), [1.0]), TypeError, "coeff to be a Tensor, got list"),
        (
            (torch.ones(3), torch.ones(4)),
            ValueError,
            r"coeff of shape \[B, K\] = \[1, 3\], got \[1, 4\]",
        ),
        ((torch.ones(3), torch.ones(())), ValueError, r"coeff of shape \[B, K\], got \[\]"),
        ((torch.ones(()), torch.ones(3)), ValueError, r"basis of shape \[K, ...\], got \[\]"),
        ((torch.ones(3).half(), torch.ones(3).half()), TypeError, "coeff of dtype float32"),
    ],
)
def test_bad_calls(args, error, words) -> None:
    with pytest.raises(error, match=f"interpolate_weights: expected {words}"):
        MF.interpolate_weights(*args)
