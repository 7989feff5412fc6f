"""manifold_step_: the formula over a run, what it may share, and that autograd learns of it."""

import itertools

import numpy as np
import pytest
import torch
from bounds import UNIT
from sampling import DTYPES, Draw, placed, wide

import neuromod_ext as nm
import neuromod_ext.functional as MF

OPTIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for momentum, dampening, decay, nesterov, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.2), (0.0, 0.05), (False, True), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening != 0))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_is_torch_sgd_in_other_coordinates(options) -> None:
    """On Q, with P = G^{-1/2} Q, it is torch.optim.SGD (the gradient transforms as G^{1/2})."""
    G = nm.Bezier(2).gram()
    values, vectors = torch.linalg.eigh(G)
    root = vectors @ values.sqrt().diag() @ vectors.T
    d = Draw("coordinates")
    P = d.tensor(3, 2, 5)
    Q = torch.nn.Parameter(torch.tensordot(root, P, 1))
    sgd = torch.optim.SGD([Q], lr=0.1, **options)
    buffer = torch.full_like(P, float("nan")) if options["momentum"] else None
    for step in range(5):
        g = d.tensor(3, 2, 5)
        Q.grad = torch.tensordot(torch.linalg.inv(root), g, 1)
        sgd.step()
        MF.manifold_step_(
            P, g, buffer, torch.linalg.inv(G), lr=0.1, first_step=step == 0, **options
        )
        torch.testing.assert_close(P, torch.tensordot(torch.linalg.inv(root), Q.detach(), 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", OPTIONS[::3], ids=lambda o: "-".join(str(v) for v in o.values())
)
def test_without_a_metric_is_torch_sgd(options, dtype) -> None:
    """To a rounding of the parameter; torch also rounds the steps between, in low precision."""
    d = Draw("identity", dtype)
    ours = d.tensor(1, 2, 300)
    theirs = torch.nn.Parameter(ours.to(wide(dtype)))
    sgd = torch.optim.SGD([theirs], lr=0.125, **options)
    buffer = torch.zeros_like(ours) if options["momentum"] else None
    g = d.tensor(1, 2, 300)
    theirs.grad = g.to(wide(dtype))
    sgd.step()
    out = MF.manifold_step_(ours, g, buffer, lr=0.125, first_step=True, **options)
    assert out is ours
    size = float(theirs.abs().max()) + 1
    torch.testing.assert_close(
        ours.to(wide(dtype)), theirs.detach(), rtol=0, atol=2 * UNIT[dtype] * size
    )


def test_first_step_ignores_what_the_buffer_held() -> None:
    for junk in (float("nan"), 1e30):
        P, m = torch.ones(2, 3), torch.full((2, 3), junk)
        MF.manifold_step_(
            P, torch.ones(2, 3), m, lr=0.5, momentum=0.9, dampening=0.5, first_step=True
        )
        assert torch.equal(m, torch.ones(2, 3))  # the first step is not dampened, as in torch
        assert torch.equal(P, torch.full((2, 3), 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "offset"])
def test_layouts(layout, dtype) -> None:
    """Any strides give the same bits; the gradient may be expanded."""
    d = Draw("layouts", dtype)
    P, g, m = d.tensor(3, 4, 5), d.tensor(3, 4, 5), d.tensor(3, 4, 5)
    G = d.coeff(3, 3)
    want, want_m = P.clone(), m.clone()
    MF.manifold_step_(want, g, want_m, G, lr=0.1, momentum=0.9)
    there, there_m = placed(P, layout), placed(m, layout)
    MF.manifold_step_(there, placed(g, layout), there_m, placed(G, layout), lr=0.1, momentum=0.9)
    assert torch.equal(there, want)
    assert torch.equal(there_m, want_m)
    ones = torch.ones(1, 1, 1, dtype=dtype)
    a, b = P.clone(), P.clone()
    MF.manifold_step_(a, ones.expand(3, 4, 5), None, G, lr=0.1)
    MF.manifold_step_(b, torch.ones(3, 4, 5, dtype=dtype), None, G, lr=0.1)
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_of_a_large_parameter_moves_as_the_whole(dtype) -> None:
    """To the bit, though other elements are left over by whole chunks and registers."""
    P, g, m = (torch.randn(3, 80_003).to(dtype) for _ in range(3))
    G, whole, buffer = torch.rand(3, 3), P.clone(), m.clone()
    numbers = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
    MF.manifold_step_(whole, g, buffer, G, **numbers)
    for first in range(0, P.shape[1], 1_009):
        part = (t[:, first : first + 1_009] for t in (P, g, m))
        MF.manifold_step_(*part, G, **numbers)
    assert torch.equal(whole, P)
    assert torch.equal(buffer, m)


# Operands that share memory: right, or refused as torch's in-place operations refuse them


def sharing(case: str):
    d = Draw("sharing")
    P, g, m, G = d.tensor(3, 4), d.tensor(3, 4), d.tensor(3, 4), d.coeff(3, 3)
    return {
        "grad is param": (P, P, m, G),
        "grad is buffer": (P, m, m, G),
        "buffer is param": (P, g, P, G),
        "metric is param": (square := d.tensor(3, 3), d.tensor(3, 3), None, square),
        "param overlaps itself": (d.tensor(1, 4).expand(3, 4), g, None, G),
        "buffer overlaps itself": (P, g, d.tensor(1, 4).expand(3, 4), G),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        "grad is param",
        "grad is buffer",
        "buffer is param",
        "metric is param",
        "param overlaps itself",
        "buffer overlaps itself",
    ],
)
def test_shared_memory_is_right_or_refused(case) -> None:
    P, g, m, G = sharing(case)
    apart = [None if t is None else t.clone() for t in (P, g, m, G)]
    numbers = {"lr": 0.1, "momentum": 0.0 if m is None else 0.9}
    MF.manifold_step_(*apart, **numbers)
    try:
        MF.manifold_step_(P, g, m, G, **numbers)
    except (ValueError, RuntimeError) as error:
        assert "manifold_step_" in str(error)
        return
    assert "itself" not in case
    torch.testing.assert_close(P, apart[0])
    if m is not None and case != "buffer is param":
        torch.testing.assert_close(m, apart[2])
    assert case != "buffer is param"


# Autograd


def test_autograd_sees_the_change() -> None:
    """A graph that saved the parameter must not use the new one in the old one's place."""
    P = torch.nn.Parameter(torch.ones(2, 3))
    m = torch.zeros(2, 3)
    versions = P._version, m._version
    loss = (P * P).sum()
    MF.manifold_step_(P, torch.ones(2, 3), m, lr=0.1, momentum=0.9)
    assert P._version > versions[0]
    assert m._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_keep_requires_grad() -> None:
    P = torch.nn.Parameter(torch.ones(2, 3))
    out = MF.manifold_step_(P, torch.ones(2, 3), lr=0.1)
    assert out is P
    assert P.requires_grad
    assert P.is_leaf
    assert P.grad is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic) -> None:
    def update(P, g, m, G):
        P, m = P * 1, m * 1
        MF.manifold_step_(P, g, m, G, lr=0.1, momentum=0.9, nesterov=True)
        return P + m, P

    run = torch.compile(update, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 7):
        d = Draw(f"compile/{length}")
        args = d.tensor(3, length), d.tensor(3, length), d.tensor(3, length), d.coeff(3, 3)
        for got, want in zip(run(*args), update(*args), strict=True):
            assert torch.equal(got, want)


def test_compile_changes_its_inputs() -> None:
    def update(P, g, m):
        MF.manifold_step_(P, g, m, lr=0.1, momentum=0.9)

    d = Draw("inputs")
    P, g, m = d.tensor(3, 5), d.tensor(3, 5), d.tensor(3, 5)
    want = P.clone(), m.clone()
    update(want[0], g, want[1])
    torch.compile(update, fullgraph=True, backend="aot_eager")(P, g, m)
    assert torch.equal(P, want[0])
    assert torch.equal(m, want[1])


def test_export() -> None:
    class Update(torch.nn.Module):
        def forward(self, P, g, G):
            P = P.clone()
            MF.manifold_step_(P, g, None, G, lr=0.5)
            return P

    d = Draw("export")
    args = d.tensor(3, 5), d.tensor(3, 5), d.coeff(3, 3)
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(Update(), args, dynamic_shapes=({1: length}, {1: length}, None))
    for n in (5, 8):
        args = d.tensor(3, n), d.tensor(3, n), args[2]
        want = args[0] - 0.5 * torch.tensordot(args[2], args[1], 1)
        torch.testing.assert_close(program.module()(*args), want)


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_transforms_are_right_or_refused(transform) -> None:
    """It is not differentiable, and says so: no tangent is dropped in silence."""
    d = Draw("transforms")
    P, g = d.tensor(2, 3, 4), d.tensor(2, 3, 4)

    def update(p, g):
        return MF.manifold_step_(p.clone(), g, lr=0.5)

    def run():
        if transform == "vmap":
            return torch.vmap(update)(P, g)
        return torch.func.jvp(update, (P, g), (torch.ones_like(P), torch.ones_like(g)))[1]

    try:
        got = run()
    except (RuntimeError, ValueError):
        return
    torch.testing.assert_close(got, P - 0.5 * g if transform == "vmap" else torch.full_like(g, 0.5))


def test_empty() -> None:
    for shape in ((0, 3), (3, 0), (0,)):
        P = torch.zeros(shape)
        K = shape[0]
        assert (
            MF.manifold_step_(
                P, torch.zeros(shape), torch.zeros(shape), torch.eye(K), lr=1.0, momentum=0.5
            )
            is P
        )


def test_numbers_are_used_in_full() -> None:
    """In float64 no number passes through float32."""
    P, g = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    MF.manifold_step_(P, g, lr=1 / 3, weight_decay=1 / 7)
    assert abs(P.item() - (1 - (1 / 3) * (1 + 1 / 7))) <= 2 * np.finfo(np.float64).eps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"param": [1.0]}, "param to be a Tensor, got list"),
        ({"grad": None}, "grad to be a Tensor, got NoneType"),
    ],
)
def test_bad_calls(change, words) -> None:
    good = {"param": torch.ones(2, 3), "grad": torch.ones(2, 3), "lr": 0.1}
    with pytest.raises(TypeError, match=f"manifold_step_: expected {words}"):
        MF.manifold_step_(**good | change)
