"""The backward of manifold_linear: one fused op, or separate ones where a derivative may follow."""

import itertools
from collections.abc import Callable

import pytest
import torch
from bounds import check
from entry import Call
from op_entries import OPS
from sampling import DTYPES, Draw, name_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import neuromod_ext.functional as MF
from neuromod_ext import _C, _ops

FUSED = ("manifold_linear_backward", "manifold_linear_local_backward")
SEPARATE = tuple(f"manifold_linear_grad_{name}" for name in ("input", "basis", "coeff"))


class Calls(TorchDispatchMode):
    """Which of our ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "neuromod_ext":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def operands(local: bool, tokens: tuple[int, ...] = (2,)) -> tuple[list[Tensor], Callable]:
    """Leaves, and the function of them: dense, or with an index."""
    d = Draw(f"operands/{local}")
    leaves = [d.tensor(5, *tokens, 3), d.tensor(4, 2, 3), d.coeff(5, 2 if local else 4)]
    leaves = [t.requires_grad_() for t in (*leaves, d.tensor(4, 2))]
    index = d.index(5, modulus=4)

    def call(x: Tensor, P: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return (
            MF.manifold_linear_local(x, P, index, c, b) if local else MF.manifold_linear(x, P, c, b)
        )

    return leaves, call


both = pytest.mark.parametrize("local", [False, True], ids=["dense", "local"])


@both
def test_one_fused_op_where_nothing_follows(local: bool) -> None:
    leaves, call = operands(local)
    out = call(*leaves).sin().sum()
    with Calls() as calls:
        out.backward()
    assert calls.names == [FUSED[local]]


@both
def test_separate_ops_where_a_derivative_may_follow(local: bool) -> None:
    leaves, call = operands(local)
    want = torch.autograd.grad(call(*leaves).sin().sum(), leaves)
    with Calls() as calls:
        got = torch.autograd.grad(call(*leaves).sin().sum(), leaves, create_graph=True)
    assert set(SEPARATE) <= set(calls.names)
    assert not set(FUSED) & set(calls.names)
    assert all(g.requires_grad for g in got)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@both
def test_tangents_pass_through_a_backward_without_a_graph(local: bool) -> None:
    """Forward over reverse asks for no graph, and yet for a derivative of the backward."""
    leaves, call = operands(local)
    tangents = [t.detach().cos() for t in leaves]

    def gradients(*args: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*args).sin().sum(), args, create_graph=True)

    want = torch.func.jvp(
        lambda *a: torch.func.grad(lambda *b: call(*b).sin().sum(), (0, 1, 2, 3))(*a),
        tuple(t.detach() for t in leaves),
        tuple(tangents),
    )[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, u) for t, u in zip(leaves, tangents, strict=True)]
        grads = torch.autograd.grad(call(*duals).sin().sum(), leaves)
        got = [forward_ad.unpack_dual(g).tangent for g in grads]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@both
def test_batched_cotangents(local: bool) -> None:
    leaves, call = operands(local)
    out = call(*leaves)
    cotangents = Draw("cotangents").tensor(3, *out.shape)
    got = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in cotangents]
    for g, w in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(w))


@both
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_double_backward_of_compiled_code_is_right_or_refused(local: bool, backend: str) -> None:
    leaves, call = operands(local)

    def second(function: Callable) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    want = second(call)
    try:
        got = second(compiled)
    except RuntimeError as error:
        assert backend == "aot_eager"
        assert "double backward" in str(error)
        return
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_op_refuses_a_derivative(name: str) -> None:
    d = Draw("refuse")
    call = OPS[name].large(d)
    call.tensors[0].requires_grad_()
    results = OPS[name].run(_ops.OPS[name], call)
    words = f"{name}: expected no derivative of this op to be asked for"
    with pytest.raises(NotImplementedError, match=words):
        results[0].sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUSED)
def test_every_choice_of_gradients(name: str, dtype: torch.dtype) -> None:
    """A gradient is the same bits without the others, and an empty tensor if not needed."""
    whole = OPS[name].large(Draw(f"mask/{name_of(dtype)}", dtype))
    everything = OPS[name].run(_ops.OPS[name], whole)
    for mask in itertools.product((True, False), repeat=4):
        some = OPS[name].run(_ops.OPS[name], Call(whole.tensors, {"needed": list(mask)}))
        for need, got, want in zip(mask, some, everything, strict=True):
            assert torch.equal(got, want if need else torch.empty(0, dtype=dtype)), mask
            assert need or (got.shape, got.dtype) == ((0,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_what_separate_ops_yield(dtype: torch.dtype) -> None:
    """Within the bound of either; the bias adds to the gradient of the coefficients."""
    for i in range(20):
        d = Draw(f"separate/{name_of(dtype)}/{i}", dtype)
        call = OPS["manifold_linear_backward"].draw(d, 20_000)
        call.others["needed"] = [True] * 4
        g, x, P, c, bias = call.tensors
        run = _ops.OPS
        grads = [
            run["manifold_linear_grad_input"](g, P, c),
            run["manifold_linear_grad_basis"](g, x, c),
            run["manifold_linear_grad_coeff"](g, x, P),
        ]
        if bias is not None:
            grads[2] = (
                grads[2]
                + (g.to(c.dtype).flatten(1, -2).sum(1) if g.dim() > 2 else g.to(c.dtype))
                @ bias.to(c.dtype).T
            )
        for got, want in zip(grads, OPS["manifold_linear_backward"].expected(call), strict=False):
            check(got, want, d)


@pytest.mark.skipif(
    not _ops.EXTENSION or "float16 tiles" in _C.cpu_features(),
    reason="products of float16 round c g to it",
)
@pytest.mark.parametrize("g, c, x", [(9e-6, 0.003, 100.0), (4e4, 2.0, 2.0**-12)])
def test_what_does_not_fit_into_float16_on_the_way(g: float, c: float, x: float) -> None:
    """c g is below or beyond float16's numbers; their product with x is not."""
    B, K, O, I = 64, 3, 70, 60
    grad, input, basis = (
        torch.full(n, v).half() for n, v in (((B, O), g), ((B, I), x), ((K, O, I), 0.0))
    )
    coeff = torch.full((B, K), c)
    op = torch.ops.neuromod_ext.manifold_linear_backward
    _, found, _, _ = op(grad, input, basis, coeff, None, [False, True, False, False])
    want = B * c * float(grad[0, 0]) * float(input[0, 0])
    torch.testing.assert_close(found.float(), torch.full((K, O, I), want), rtol=2e-3, atol=0)
