"""Autocast: what is cast, what is not, and that the values are those of explicit casts."""

import pytest
import torch
from bounds import UNIT
from compositions import ALL, Composition, every
from sampling import Draw
from torch import Tensor

import neuromod_ext as nm
import neuromod_ext.functional as MF

LOW = (torch.bfloat16, torch.float16)
# weights and metrics stay as they are, and so does what is only scaled or rotated
FULL_PRECISION = (
    "interpolate_weights",
    "manifold_metric",
    "ContextModulation",
    "hadamard_rotate",
)


def explicit(
    entry: Composition, args: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Operands in the low dtype; coefficients (and s), float32."""
    wide = {
        "manifold_linear": (2,),
        "manifold_linear_local": (2,),
        "manifold_conv1d": (2,),
        "manifold_conv2d": (2,),
        "manifold_conv3d": (2,),
        "natural_gradient": (2, 3),
        "ManifoldLinear": (1,),
    }.get(entry.subject, ())
    return tuple(t if i in wide else t.to(dtype) for i, t in enumerate(args))


@pytest.mark.parametrize("dtype", LOW)
@every
def test_forward_and_backward(entry: Composition, dtype: torch.dtype) -> None:
    args = entry.make(Draw(entry.id, torch.float32), 5)
    inputs = [t.clone().requires_grad_() for t in args]
    with torch.autocast("cpu", dtype):
        out = entry.call(*inputs)
    grads = torch.autograd.grad(out.float().sum(), inputs)
    want = [t.double().requires_grad_() for t in args]
    reference = entry.definition(*want)
    wanted = torch.autograd.grad(reference.sum(), want)
    assert out.dtype == (torch.float32 if entry.subject in FULL_PRECISION else dtype)
    assert [g.dtype for g in grads] == [torch.float32] * len(args)
    slack = 64 * UNIT[out.dtype]
    for got, exact in zip((out, *grads), (reference, *wanted), strict=True):
        torch.testing.assert_close(
            got.double(), exact, rtol=slack, atol=slack * float(exact.abs().max())
        )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "entry",
    [
        e
        for e in ALL
        if e.subject.startswith(("manifold_linear", "manifold_conv", "natural_gradient", "fly"))
        and e.label != "one_condition"
    ],
    ids=lambda e: e.id,
)
def test_equals_explicit_casts(entry: Composition, dtype: torch.dtype) -> None:
    args = entry.make(Draw(entry.id, torch.float32), 5)
    with torch.autocast("cpu", dtype):
        out = entry.call(*args)
    assert torch.equal(out, entry.call(*explicit(entry, args, dtype)))


@every
def test_float64_is_untouched(entry: Composition) -> None:
    args = entry.make(Draw(entry.id, torch.float64), 5)
    want = entry.call(*args)
    with torch.autocast("cpu", torch.bfloat16):
        out = entry.call(*args)
    assert out.dtype == torch.float64
    assert torch.equal(out, want)


def test_mixed_operands() -> None:
    """One autocast layer's output, in the low dtype, enters the next beside float32 weights."""
    d = Draw("mixed", torch.float32)
    x, P, c, b = d.tensor(5, 3), d.tensor(3, 2, 3), d.coeff(5, 3), d.tensor(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = MF.manifold_linear(x.bfloat16(), P, c, b)
    assert torch.equal(out, MF.manifold_linear(x.bfloat16(), P.bfloat16(), c, b.bfloat16()))


def test_a_model_under_autocast() -> None:
    model = nm.convert(
        torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3)
        ),
        nm.Ellipse(),
    )
    x, s = torch.randn(5, 1, 4, 4), torch.rand(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, s)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x, s)
    assert out.dtype == compiled.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x, s), rtol=0.1, atol=0.05)
    torch.testing.assert_close(compiled, out, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_coefficients_must_be_wide() -> None:
    d = Draw("wide", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="convert it with"):
        MF.manifold_linear(d.tensor(5, 3), d.tensor(3, 2, 3), d.coeff(5, 3).bfloat16())
