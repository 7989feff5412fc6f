"""What ops read and write, to the byte: canaries, poisoned outputs, operands that share memory."""

from collections.abc import Iterator

import pytest
import torch
from bounds import check
from conftest import Backend
from entry import Call
from op_entries import OPS
from sampling import LAYOUTS, Draw, snapshot

from neuromod_ext import _ops

CASES = [pytest.param(100, id="quick"), pytest.param(1000, id="full", marks=pytest.mark.full)]
GUARDED = ("contiguous", "transposed", "strided", "offset")


@pytest.fixture
def _poison() -> Iterator[None]:
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("total", CASES)
@pytest.mark.parametrize("name", _ops.NAMES)
@pytest.mark.usefixtures("_poison")
def test_outputs_are_written_whole(name: str, total: int, backend: Backend) -> None:
    """Results beside NaN, in memory that was NaN, are what they should be."""
    op = OPS[name]
    for i in range(backend.cases(total)):
        dtype = op.dtypes[i % len(op.dtypes)]
        draw = Draw(f"poison/{name}/{i}", dtype, backend.device, LAYOUTS)
        call = op.draw(draw, 20_000)
        want = op.expected(call)
        for got, expected in zip(op.run(backend.op(name), call), want, strict=True):
            check(got, expected, draw)


@pytest.mark.parametrize("total", CASES)
@pytest.mark.parametrize("name", _ops.NAMES)
def test_nothing_else_is_written(name: str, total: int, backend: Backend) -> None:
    """Inputs, and all that lies around them and around what is changed, stay as they were."""
    op = OPS[name]
    for i in range(backend.cases(total)):
        dtype = op.dtypes[i % len(op.dtypes)]
        layouts = GUARDED if op.mutates else LAYOUTS
        draw = Draw(f"canary/{name}/{i}", dtype, backend.device, layouts)
        call = op.draw(draw, 20_000)
        before = [None if t is None else snapshot(t) for t in call.tensors]
        results = op.run(backend.op(name), call)
        if not op.mutates:
            operands = {t.untyped_storage().data_ptr() for t in call.tensors if t is not None}
            assert not {t.untyped_storage().data_ptr() for t in results if t.numel()} & operands
        for position, t in enumerate(call.tensors):
            if t is None:
                continue
            if position in op.mutates:  # what was changed must lie within the view
                erased = t.clone()
                t.fill_(0)
                after = snapshot(t)
                view_bytes(t, before[position])
                assert torch.equal(after, before[position]), draw
                t.copy_(erased)
            else:
                assert torch.equal(snapshot(t), before[position]), draw


def view_bytes(t: torch.Tensor, whole: torch.Tensor) -> None:
    """Set the bytes of ``t``'s elements in a snapshot of its allocation to zero."""
    like = torch.empty(0, dtype=t.dtype, device=t.device).set_(whole.untyped_storage())
    like.as_strided(t.shape, t.stride(), t.storage_offset()).zero_()


# The same tensor in two roles


FLY_INDEX = torch.tensor([[0, 2], [1, 2], [0, 1], [1, 1]])
SAME = {
    "manifold_linear": lambda d: (x := d.tensor(3, 3), d.tensor(3, 2, 3), x),
    "manifold_linear_backward": lambda d: (
        (g := d.tensor(3, 3)),
        g,
        d.tensor(3, 3, 3),
        g,
        d.tensor(3, 3),
        [True] * 4,
    ),
    "manifold_linear_grad_input": lambda d: (g := d.tensor(3, 3), d.tensor(3, 3, 2), g),
    "manifold_linear_grad_basis": lambda d: (g := d.tensor(4, 4), g, g),
    "manifold_linear_grad_coeff": lambda d: (g := d.tensor(4, 2, 5), g, d.tensor(3, 5, 5)),
    "manifold_linear_local": lambda d: (
        x := d.tensor(3, 3),
        d.tensor(4, 2, 3),
        d.index(3, modulus=4),
        x,
    ),
    "manifold_linear_local_backward": lambda d: (
        (g := d.tensor(3, 3)),
        g,
        d.tensor(4, 3, 3),
        d.index(3, modulus=4),
        g,
        None,
        [True] * 4,
    ),
    "manifold_conv": lambda d: (x := d.tensor(3, 3, 3), d.tensor(3, 2, 3, 2), x[0], None),
    "manifold_conv_backward": lambda d: (
        g := d.tensor(3, 3, 3),
        g,
        d.tensor(3, 3, 3, 1),
        g[0],
        None,
    ),
    "interpolate_weights": lambda d: (P := d.tensor(4, 4), P),
    "interpolate_weights_backward": lambda d: (g := d.tensor(4, 4), g, g, [True] * 2),
    "interpolate_weights_grad_basis": lambda d: (g := d.tensor(4, 4), g),
    "interpolate_weights_grad_coeff": lambda d: (g := d.tensor(4, 2, 3), g),
    "manifold_metric": lambda d: (c := d.tensor(5, 5), c[0]),
    "fly_hash": lambda d: (d.tensor(3, 3), FLY_INDEX),
    "hadamard_rotate": lambda d: (d.tensor(3, 5), torch.ones(6, dtype=torch.int8)),
    "fly_hash_backward": lambda d: (x := d.tensor(4, 4), x, FLY_INDEX),
    "fly_readout": lambda d: (x := d.tensor(4, 4), FLY_INDEX, x[0], x, None),
    "fly_readout_backward": lambda d: (x := d.tensor(4, 4), x, FLY_INDEX, x[0], x, None),
}


WALK = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}
OTHERS = {
    "manifold_conv": WALK,
    "manifold_conv_backward": WALK | {"needed": [True] * 4},
    "fly_readout_backward": {"needed": [True] * 3},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", sorted(SAME))
def test_the_same_tensor_twice(name: str, dtype: torch.dtype, backend: Backend) -> None:
    draw = Draw(f"same/{name}", dtype, backend.device)
    tensors = [
        t.to(backend.device) if torch.is_tensor(t) else t for t in SAME[name](draw)
    ]  # an index lies on the CPU
    call = Call(tensors, OTHERS.get(name, {}))
    results = OPS[name].run(backend.op(name), call)
    for got, want in zip(results, OPS[name].expected(call), strict=True):
        check(got, want, draw)


def test_all_are_tried_twice() -> None:
    changing = {name for name in _ops.NAMES if OPS[name].mutates}  # test_manifold_step.py, _update
    assert set(SAME) | changing == set(_ops.NAMES)


@pytest.mark.parametrize("name", [name for name in sorted(SAME) if OPS[name].differentiable])
def test_gradient_of_the_same_tensor_twice(name: str) -> None:
    """Both roles' gradients add up."""
    operands = SAME[name](Draw(f"same/{name}"))
    shared = operands[0].requires_grad_()
    if name == "manifold_metric":
        operands = (shared, shared[0])
    function, options = _ops.OPS[name], OTHERS.get(name, {})
    if name == "manifold_conv":
        options = options | {"bias": None}
    assert torch.autograd.gradcheck(
        lambda t: function(
            *(
                t if u is shared else t[0] if u.dim() < t.dim() and u.is_floating_point() else u
                for u in operands
                if u is not None
            ),
            **options,
        ),
        shared,
    )
