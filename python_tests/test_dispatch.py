"""Which wrapping a call takes: kernels wherever they can run, compiled code included."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from compositions import ALL, WITHOUT_OPS, Composition, every
from functorch.compile import make_boxed_func
from sampling import Draw
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import neuromod_ext.functional as MF
from neuromod_ext import _transforms

OURS = {
    "manifold_linear": ("manifold_linear", "manifold_linear_backward"),
    "manifold_linear_local": ("manifold_linear_local", "manifold_linear_local_backward"),
    "natural_gradient": ("grad_basis", "grad_input", "manifold_linear"),
    "manifold_metric": ("manifold_metric",),
    "fly_hash": ("fly_hash", "fly_hash_backward"),
    "fly_readout": ("fly_readout", "fly_readout_backward"),
    "hadamard_rotate": ("hadamard_rotate",),
    "FlyHash": ("fly_hash", "fly_hash_backward"),
    "FlyNet": ("fly_readout", "fly_readout_backward"),
}
FOLDED = ("interpolate_weights", "interpolate_weights_backward")
CONV = ("manifold_conv", "manifold_conv_backward")
ON_THE_OP = (
    "manifold_conv1d-bias",
    "manifold_conv2d-groups",
    "ManifoldConv1d-ellipse",
    "ManifoldConv2d-ellipse",
)


@pytest.mark.parametrize(
    "entry", [e for e in ALL if e.subject not in WITHOUT_OPS], ids=lambda entry: entry.id
)
def test_compiled_code_calls_the_kernels(entry: Composition) -> None:
    """Forward and backward graphs hold the ops, and no einsum in their place."""
    targets: list[str] = []

    def keep(graph: torch.fx.GraphModule, example: object) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    inputs = [t.requires_grad_() for t in entry.make(Draw(entry.id), 3)]
    torch.compile(entry.call, fullgraph=True, backend=backend)(*inputs).sin().sum().backward()
    ours = [target for target in targets if target.startswith("neuromod_ext.")]
    whole = entry.subject not in ("ManifoldLinear", *OURS)
    linear = "manifold_linear_local" if entry.label == "piecewise" else "manifold_linear"
    expected = FOLDED if whole else OURS.get(entry.subject, OURS[linear])
    for suffix in CONV if entry.id in ON_THE_OP else expected:
        assert any(target.removesuffix(".default").endswith(suffix) for target in ours), (
            suffix,
            targets,
        )


def test_transform_active() -> None:
    """The predicate that chooses, pinned: it asks torch's internals."""
    seen: list[bool] = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(_transforms.transform_active())
        return x.sin().sum()

    x = torch.ones(3)
    spy(x)
    assert seen == [False]
    for transform in (grad(spy), vmap(spy), partial(jvp, spy, tangents=(x,))):
        seen.clear()
        transform((x,)) if isinstance(transform, partial) else transform(x)
        assert seen == [True]
    seen.clear()
    spy(x.requires_grad_()).backward()
    assert seen == [False]


def test_tangents_active() -> None:
    """Likewise."""
    seen = [_transforms.tangents_active()]
    with forward_ad.dual_level():
        seen.append(_transforms.tangents_active())
    assert seen == [False, True]
    assert not _transforms.tangents_active()


@every
def test_without_gradients_no_graph(entry: Composition) -> None:
    """The same bits, whether operands require grad or not, and no node where nothing asks."""
    args = entry.make(Draw(entry.id), 3)
    with torch.no_grad():
        plain = entry.call(*args)
    asked = entry.call(*(t.clone().requires_grad_() for t in args))
    for out in (plain, entry.call(*args)):
        assert out.grad_fn is None
        assert not out.requires_grad
        assert torch.equal(out, asked)


def test_what_a_transform_left_behind() -> None:
    """A tensor that escaped from torch.func.grad is the one that went in."""
    escaped: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        escaped.append(x)
        return x.sum()

    d = Draw("escaped")
    x, P, c = d.tensor(3, 4), d.tensor(2, 5, 4), d.coeff(3, 2)
    for leaf in (x, x.clone().requires_grad_()):
        escaped.clear()
        grad(keep)(leaf)
        out = MF.manifold_linear(escaped[0], P, c)
        assert torch.equal(out, MF.manifold_linear(x, P, c))
        assert out.requires_grad == leaf.requires_grad
        if leaf.requires_grad:
            out.sum().backward()
            assert leaf.grad is not None


@pytest.mark.parametrize("inside", [False, True])
def test_transform_active_in_compiled_code(inside: bool) -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 if _transforms.transform_active() else x * 3).sum()

    function = grad(branch) if inside else branch
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(torch.ones(2))
    assert torch.equal(out, torch.full((2,), 2.0) if inside else torch.tensor(6.0))
