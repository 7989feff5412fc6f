"""Which wrapping a call takes: kernels wherever they can run, compiled code included."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from compositions import ALL, Composition
from functorch.compile import make_boxed_func
from sampling import Draw
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, jvp, vmap

from neuromod_ext import autograd

OURS = {
    "manifold_linear": ("manifold_linear", "grad_input", "grad_basis", "grad_coeff"),
    "natural_gradient": ("grad_basis", "grad_input", "manifold_linear"),
    "manifold_metric": ("manifold_metric",),
}
FOLDED = ("interpolate_weights", "grad_basis", "grad_coeff")


@pytest.mark.parametrize("entry", ALL, ids=[entry.id for entry in ALL])
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
    whole = entry.label == "one_condition" or entry.subject not in ("ManifoldLinear", *OURS)
    for suffix in FOLDED if whole else OURS.get(entry.subject, OURS["manifold_linear"]):
        assert any(target.removesuffix(".default").endswith(suffix) for target in ours), (
            suffix,
            targets,
        )


def test_transform_active() -> None:
    """The predicate that chooses, pinned: it asks torch's internals."""
    seen: list[bool] = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(autograd.transform_active())
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


@pytest.mark.parametrize("inside", [False, True])
def test_transform_active_in_compiled_code(inside: bool) -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 if autograd.transform_active() else x * 3).sum()

    function = grad(branch) if inside else branch
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(torch.ones(2))
    assert torch.equal(out, torch.full((2,), 2.0) if inside else torch.tensor(6.0))
