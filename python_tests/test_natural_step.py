"""natural_step_, and the op it stands on: what they change, may share, and refuse."""

import numpy as np
import pytest
import torch
from bounds import check, expect
from entry import einsum
from linear_entries import PLANS, tokens
from sampling import DTYPES, Draw, name_of, placed
from torch import Tensor

import neuromod_ext as nm
import neuromod_ext.functional as MF
from neuromod_ext import _ops, reference

Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(d: Draw, B: int = 5, middle=(2,), K: int = 3, O: int = 4, I: int = 6) -> Args:
    """P, x, g, c and G⁻¹."""
    return (
        d.tensor(K, O, I, in_place=True),
        d.tensor(B, *middle, I),
        d.tensor(B, *middle, O),
        d.coeff(B, K),
        d.coeff(K, K),
    )


@pytest.mark.parametrize("plan", ["", *PLANS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_a_step_along_the_natural_gradient(dtype: torch.dtype, plan: str, monkeypatch) -> None:
    """Within the bound of the formula: K terms of a dual coefficient, then its B T products."""
    monkeypatch.setenv("NEUROMOD_PLAN", plan)
    for i in range(12):
        d = Draw(f"step/{name_of(dtype)}/{i}", dtype)
        B, T, O, I = d.sizes(4, 20_000)
        args = arguments(d, B, d.pick((), (T,)), d.pick(1, 2, 5), O, I)
        lr = d.pick(0.0, 0.125, -1.0, 3.0)

        def formula(at, P, x, g, c, G, lr=lr):
            dual = einsum("jk,bk->bj", G, c) * (lr if at.minus < 0 else abs(lr))
            cg = einsum("bk,bto->btko", dual, tokens(g)) + at.tiny
            return P + at.minus * einsum("btko,bti->koi", cg, tokens(x))

        rows = int(np.prod(args[1].shape[:-1]))
        want = expect(formula, list(args), rows + len(args[0]) + 4, dtype, dtype)
        out = MF.natural_step_(*args, lr)
        assert out is args[0]
        check(out, want, d)


def test_is_manifold_step_of_the_gradient() -> None:
    P, x, g, c, _ = arguments(Draw("steps"), K=3)
    inverse = nm.Ellipse().gram_inverse()
    other = P.clone()
    gradient = torch.einsum("bk,bto,bti->koi", c, g, x)
    MF.manifold_step_(other, gradient, None, inverse, lr=0.1)
    torch.testing.assert_close(MF.natural_step_(P, x, g, c, inverse, 0.1), other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "offset"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Any strides give the same bits (torch multiplies what the coefficients are multiplied by)."""
    P, x, g, *others = arguments(Draw("layouts", dtype))
    want = MF.natural_step_(P.clone(), x, g, *others, 0.5)
    there = placed(P, layout)
    out = MF.natural_step_(there, placed(x, layout), placed(g, layout), *others, 0.5)
    assert out is there
    assert torch.equal(there, want)


# What may share memory


def sharing(case: str) -> Args:
    P, x, g, c, G = arguments(Draw("sharing"), B=3, middle=(4,), K=3, O=6, I=6)
    return {
        "input is basis": (P, P[:, :4], g, c, G),
        "grad_output is basis": (P, x, P[:, :4], c, G),
        "coeff is basis": (P, x, g, P[0, :3, :3], G),
        "metric is basis": (P, x, g, c, P[0, :3, :3]),
        "basis overlaps itself": (P[:1].expand(3, 6, 6), x, g, c, G),
        "input is grad_output": (P, x, x, c, G),
        "basis beside input": (
            (whole := torch.cat((P.flatten(), x.flatten())))[: P.numel()].view_as(P),
            whole[P.numel() :].view_as(x),
            g,
            c,
            G,
        ),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        "input is basis",
        "grad_output is basis",
        "coeff is basis",
        "metric is basis",
        "basis overlaps itself",
        "input is grad_output",
        "basis beside input",
    ],
)
def test_shared_memory_is_right_or_refused(case: str) -> None:
    args = sharing(case)
    apart = [t.clone() for t in args]
    before = args[0].clone()
    want = MF.natural_step_(*apart, 0.5)
    try:
        MF.natural_step_(*args, 0.5)
    except ValueError as error:
        assert "manifold_linear_update_: expected" in str(error)
        assert "; clone it" in str(error)
        assert torch.equal(args[0], before)
        assert case in ("input is basis", "grad_output is basis", "basis overlaps itself")
        return
    torch.testing.assert_close(args[0], want)


@pytest.mark.parametrize("role", [1, 2])
def test_the_reference_refuses_shared_memory_in_the_same_words(role: int) -> None:
    P, x, g, c, _ = arguments(Draw("words"), B=3, middle=(4,), K=3, O=6, I=6)
    args = [P, g, x, c]
    args[role] = P[:, :4]
    told = []
    for op in (_ops.OPS["manifold_linear_update_"], reference.manifold_linear_update_):
        with pytest.raises(ValueError, match="in memory of its own") as caught:
            op(*args)
        told.append(str(caught.value))
    assert told[0] == told[1]


# Autograd


def test_autograd_sees_the_change() -> None:
    P, *others = arguments(Draw("version"))
    P = torch.nn.Parameter(P)
    before = P._version
    loss = (P * P).sum()
    assert MF.natural_step_(P, *others, 0.1) is P
    assert P._version > before
    assert (P.requires_grad, P.is_leaf, P.grad) == (True, True, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operands_that_require_grad_are_read_only() -> None:
    P, *others = arguments(Draw("requires"))
    others = [t.requires_grad_() for t in others]
    out = MF.natural_step_(P, *others, 0.1)
    assert not out.requires_grad


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_transforms_are_refused(transform: str) -> None:
    P, *others = arguments(Draw("transforms"))

    def step(x: Tensor) -> Tensor:
        return MF.natural_step_(P.clone(), x, *others[1:], 0.1).sum()

    x = others[0]
    runs = {
        "vmap": lambda: torch.vmap(step)(x[None]),
        "jvp": lambda: torch.func.jvp(step, (x,), (x,)),
        "grad": lambda: torch.func.grad(step)(x),
    }
    with pytest.raises(NotImplementedError, match=r"natural_step_: expected no .* transform"):
        runs[transform]()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def step(P: Tensor, *others: Tensor) -> Tensor:
        P = P * 1
        MF.natural_step_(P, *others, 0.5)
        return P + 1

    run = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 7):
        args = arguments(Draw(f"compile/{batch}"), B=batch)
        assert torch.equal(run(*args), step(*args))


def test_compile_changes_its_input() -> None:
    args = arguments(Draw("inputs"))
    want = MF.natural_step_(args[0].clone(), *args[1:], 0.5)
    run = torch.compile(lambda *a: MF.natural_step_(*a, 0.5), fullgraph=True, backend="aot_eager")
    run(*args)
    assert torch.equal(args[0], want)


def test_export() -> None:
    class Step(torch.nn.Module):
        def forward(self, P, *others):
            return MF.natural_step_(P.clone(), *others, 0.5)

    batch = {0: torch.export.Dim("batch", min=2)}
    args = arguments(Draw("export"))
    program = torch.export.export(Step(), args, dynamic_shapes=(None, (batch, batch, batch, None)))
    for n in (5, 8):
        args = arguments(Draw(f"export/{n}"), B=n)
        torch.testing.assert_close(program.module()(*args), Step()(*args))


# Autocast and bad calls


def test_autocast_casts_all_but_the_basis() -> None:
    P, *others = arguments(Draw("autocast", torch.float32))
    low = [t.bfloat16() for t in (P, *others[:2])]
    want = MF.natural_step_(low[0].clone(), *low[1:], *others[2:], 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = MF.natural_step_(low[0], *others, 0.5)
        before = P.clone()
        with pytest.raises(TypeError, match="natural_step_: expected basis of dtype bfloat16"):
            MF.natural_step_(P, *others, 0.5)
    assert torch.equal(got, want)
    assert torch.equal(P, before)
    wide = arguments(Draw("autocast"))
    want = MF.natural_step_(wide[0].clone(), *wide[1:], 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MF.natural_step_(*wide, 0.5), want)


GOOD = {
    "basis": torch.ones(3, 5, 6),
    "input": torch.ones(4, 6),
    "grad_output": torch.ones(4, 5),
    "coeff": torch.ones(4, 3),
    "metric_inverse": torch.ones(3, 3),
    "lr": 0.1,
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"basis": None}, TypeError, "basis to be a Tensor, got NoneType"),
        ({"input": 1}, TypeError, "input to be a Tensor, got int"),
        ({"grad_output": [1.0]}, TypeError, "grad_output to be a Tensor, got list"),
        ({"coeff": 1.0}, TypeError, "coeff to be a Tensor, got float"),
        ({"metric_inverse": None}, TypeError, "metric_inverse to be a Tensor, got NoneType"),
        ({"lr": float("nan")}, ValueError, "lr to be finite, got nan"),
        ({"lr": float("inf")}, ValueError, "lr to be finite, got inf"),
        (
            {"basis": torch.ones(3, 6, 5)},
            ValueError,
            r"basis of shape \[K, O, I\] = \[3, 5, 6\], got \[3, 6, 5\]",
        ),
        (
            {"basis": torch.ones(3, 5, 6).half()},
            TypeError,
            r"basis of dtype float32 \(that of grad_output\), got float16; convert one of them",
        ),
        (
            {"input": torch.ones(5, 6)},
            ValueError,
            r"input of shape \[B, ..., I\] = \[4, 6\], got \[5, 6\]",
        ),
        (
            {"coeff": torch.ones(3)},
            ValueError,
            r"coeff of shape \[B, K\], got \[3\]",
        ),
        (
            {"metric_inverse": torch.ones(2, 2)},
            ValueError,
            r"metric_inverse of shape \[K, K\] = \[3, 3\], got \[2, 2\]",
        ),
        (
            {"metric_inverse": torch.ones(3, 3).double()},
            TypeError,
            r"metric_inverse of dtype float32 \(that of coeff\), got float64",
        ),
    ],
)
def test_bad_calls(change, error, words) -> None:
    good = {k: v.clone() if isinstance(v, Tensor) else v for k, v in GOOD.items()}
    MF.natural_step_(**good)
    before = good["basis"].clone()
    with pytest.raises(error, match=f"^natural_step_: expected {words}"):
        MF.natural_step_(**good | change)
    assert torch.equal(good["basis"], before)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(sizes) -> None:
    B, K, O, I = sizes
    P, *others = arguments(Draw("empty"), B, (), K, O, I)
    before = P.clone()
    assert torch.equal(MF.natural_step_(P, *others, 1.0), before)


def test_the_update_reads_memory_of_its_own_alone() -> None:
    """Also where tensors share memory and torch does not know of it; and it reads what is meant."""
    buffer = np.zeros(3 * 5 * 6, np.float32)
    P = torch.from_numpy(buffer).view(3, 5, 6)
    x, g, c = torch.rand(4, 6), torch.rand(4, 5), torch.rand(4, 3)
    update = _ops.OPS["manifold_linear_update_"]
    for name, args in {
        "input": (g, torch.from_numpy(buffer)[:24].view(4, 6), c),
        "grad_output": (torch.from_numpy(buffer)[:20].view(4, 5), x, c),
        "coeff": (g, x, P[0, :4, :3]),
    }.items():
        with pytest.raises(ValueError, match=f"expected {name} in memory of its own"):
            update(P, *args)
    noted = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in (g, x, c)]
    update(P, *noted)
    want = torch.einsum("bk,bo,bi->koi", c, g, x)
    torch.testing.assert_close(P, want)
    with pytest.raises(ValueError, match="basis without a pending negation"):
        update(torch.complex(P, P).conj().imag, g, x, c)
