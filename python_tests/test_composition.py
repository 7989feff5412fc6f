"""Every public function and module under every transform of torch, compared with its definition."""

from collections.abc import Callable

import pytest
import torch
from compositions import Composition, central_first, every
from sampling import Draw
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

Args = tuple[Tensor, ...]


def arguments(entry: Composition, batch: int = 3, dtype: torch.dtype = torch.float64) -> Args:
    return entry.make(Draw(entry.id, dtype), batch)


def leaves(args: Args) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in args]


def equal(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar that is quadratic in the result, so that no derivative of it is trivial."""
    return lambda *args: function(*args).sin().square().sum()


def with_gradients(function: Callable[..., Tensor], args: Args) -> list[Tensor]:
    inputs = leaves(args)
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)]


def compiled(function: Callable[..., Tensor], backend, dynamic: bool = False):
    return torch.compile(
        lambda *args: function(*(t * 1.5 for t in args)),
        fullgraph=True,
        backend=backend,
        dynamic=dynamic,
    )


def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*(t * 1.5 for t in args))


@every
def test_eager(entry: Composition) -> None:
    args = arguments(entry)
    out = entry.call(*args)
    assert out.dtype == torch.float64
    equal(with_gradients(entry.call, args), with_gradients(entry.definition, args))


@every
def test_double_backward(entry: Composition) -> None:
    def second(function):
        inputs = leaves(arguments(entry))
        first = torch.autograd.grad(loss_of(function)(*inputs), inputs, create_graph=True)
        total = sum((g * g).sum() for g in first)
        return torch.autograd.grad(total, inputs)

    equal(second(entry.call), second(entry.definition))


@central_first
def test_compile_static(entry: Composition) -> None:
    args = arguments(entry)
    equal(
        with_gradients(compiled(entry.call, "aot_eager"), args),
        with_gradients(scaled(entry.definition), args),
    )


@central_first
def test_compile_dynamic(entry: Composition) -> None:
    """One graph serves every batch size (which equals no other size here)."""
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(entry.call, counter, dynamic=True)
    for batch in (11, 13):
        args = arguments(entry, batch)
        equal(with_gradients(run, args), with_gradients(scaled(entry.definition), args))
    assert counter.frame_count == 1


@central_first
def test_compile_inductor(entry: Composition) -> None:
    args = arguments(entry)
    run = torch.compile(entry.call, fullgraph=True, backend="inductor")
    equal(with_gradients(run, args), with_gradients(entry.definition, args))


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True])
@every
def test_compile_inductor_fused(entry: Composition, dynamic: bool) -> None:
    """With neighbours to fuse with. Inductor may compile anew for a batch, but not err."""
    run = torch.compile(scaled(entry.call), fullgraph=True, backend="inductor", dynamic=None)
    for batch in (11, 13) if dynamic else (3,):
        args = arguments(entry, batch)
        inputs = leaves(args)
        for t, batched in zip(inputs, entry.batched, strict=True):
            if dynamic and batched:
                torch._dynamo.maybe_mark_dynamic(t, 0)
        out = run(*inputs)
        got = [out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)]
        equal(got, with_gradients(scaled(entry.definition), args))


TRANSFORMS = {
    "grad": lambda f, args: grad(loss_of(f), tuple(range(len(args))))(*args),
    "vjp": lambda f, args: vjp(f, *args)[1](f(*args).cos()),
    "jacrev": lambda f, args: jacrev(f, tuple(range(len(args))))(*args),
    "jvp": lambda f, args: jvp(f, args, tuple(t.cos() for t in args)),
    "jacfwd": lambda f, args: jacfwd(f, tuple(range(len(args))))(*args),
    "hessian": lambda f, args: hessian(loss_of(f), tuple(range(len(args))))(*args),
    "jacrev_jacrev": lambda f, args: jacrev(jacrev(loss_of(f)))(*args),
    "jvp_of_grad": lambda f, args: jvp(grad(loss_of(f)), args, tuple(t.cos() for t in args)),
    "grad_of_jvp": lambda f, args: grad(
        lambda *a: jvp(f, a, tuple(t.cos() for t in a))[1].sin().sum()
    )(*args),
    "vmap": lambda f, args: vmap(f)(*(torch.stack((t, t.sin())) for t in args)),
    "vmap_jacrev": lambda f, args: vmap(jacrev(f))(*(torch.stack((t, t.sin())) for t in args)),
    "vmap_jvp": lambda f, args: vmap(lambda *a: jvp(f, a, tuple(t.cos() for t in a)))(
        *(torch.stack((t, t.sin())) for t in args)
    ),
    "vmap_vmap": lambda f, args: vmap(vmap(f))(*(torch.stack((t, t.sin()))[:, None] for t in args)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every
def test_transform(entry: Composition, transform: str) -> None:
    args, run = arguments(entry), TRANSFORMS[transform]
    equal(run(entry.call, args), run(entry.definition, args))


@pytest.mark.parametrize("which", ["one", "tail"])
@every
def test_vmap_shares_the_rest(entry: Composition, which: str) -> None:
    """Each operand alone is mapped, at its first and at its last dimension."""
    args = arguments(entry)
    for i, t in enumerate(args):
        dim = 0 if which == "one" else -1
        mapped = [*args[:i], torch.stack((t, t.sin(), t.cos()), dim), *args[i + 1 :]]
        dims = [None] * len(args)
        dims[i] = dim if dim == 0 else t.dim()
        equal(
            vmap(entry.call, tuple(dims))(*mapped),
            torch.stack(
                [entry.definition(*args[:i], u, *args[i + 1 :]) for u in (t, t.sin(), t.cos())]
            ),
        )


@every
def test_per_sample_gradients(entry: Composition) -> None:
    args = arguments(entry)
    dims = tuple(0 if batched else None for batched in entry.batched)

    def per_sample(function):
        def one(*sample):
            whole = (t[None] if b else t for t, b in zip(sample, entry.batched, strict=True))
            return loss_of(function)(*whole)

        return vmap(grad(one, tuple(range(len(args)))), dims)(*args)

    equal(per_sample(entry.call), per_sample(entry.definition))


@every
def test_jvp_of_single_operands(entry: Composition) -> None:
    """Tangents of one operand at a time, none of which requires grad."""
    args = arguments(entry)
    for i, t in enumerate(args):
        tangent = t.cos()

        def along(function, i=i, tangent=tangent):
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(u, tangent) if j == i else u for j, u in enumerate(args)
                ]
                return forward_ad.unpack_dual(function(*duals)).tangent

        equal(along(entry.call), along(entry.definition))


IN_COMPILE = {
    "grad": lambda f: lambda *args: grad(loss_of(f), tuple(range(len(args))))(*args),
    "vmap": lambda f: lambda *args: vmap(f)(*(torch.stack((t, t.sin())) for t in args)),
    "vmap_grad": lambda f: (
        lambda *args: vmap(grad(loss_of(f)))(*(torch.stack((t, t.sin())) for t in args))
    ),
    "jvp": lambda f: lambda *args: jvp(f, args, tuple(t.cos() for t in args))[1],
}


@pytest.mark.parametrize(
    "transform",
    [
        "grad",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("vmap", "vmap_grad", "jvp")),
    ],
)
@central_first
def test_transform_in_compile(entry: Composition, transform: str) -> None:
    args, make = arguments(entry), IN_COMPILE[transform]
    run = torch.compile(make(entry.call), fullgraph=True, backend="aot_eager")
    equal(run(*args), make(entry.definition)(*args))


@every
def test_checkpoint(entry: Composition) -> None:
    args = arguments(entry)
    equal(
        with_gradients(lambda *a: checkpoint(entry.call, *a, use_reentrant=False), args),
        with_gradients(entry.definition, args),
    )


@central_first
def test_compile_in_float32(entry: Composition) -> None:
    """The same kernels run, so compiled results are eager's to the bit."""
    args = arguments(entry, dtype=torch.float32)
    run = torch.compile(entry.call, fullgraph=True, backend="eager")
    for got, want in zip(with_gradients(run, args), with_gradients(entry.call, args), strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert torch.equal(got, want)
