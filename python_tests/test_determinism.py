"""The same bits, every time and on any number of threads."""

import pytest
import torch
from conftest import Backend
from entry import Call
from op_entries import OPS
from sampling import Draw, name_of

from neuromod_ext import _ops

CASES = [
    pytest.param(name, dtype, id=f"{name}-{name_of(dtype)}")
    for name, op in OPS.items()
    for dtype in op.dtypes
]


def results(name: str, call: Call) -> list[torch.Tensor]:
    op = OPS[name]
    copies = [
        t.clone() if i in op.mutates and t is not None else t for i, t in enumerate(call.tensors)
    ]
    return op.run(_ops.OPS[name], Call(copies, call.others))


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "repeats", [pytest.param(5, id="quick"), pytest.param(50, id="full", marks=pytest.mark.full)]
)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_repeats_and_threads(
    name: str, dtype: torch.dtype, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands large enough for every kernel to split its work."""
    call = OPS[name].large(Draw(f"large/{name}/{name_of(dtype)}", dtype))
    first = results(name, call)
    assert all(t.isfinite().all() and t.any() for t in first)
    for _ in range(repeats - 1):
        assert same(first, results(name, call))
    monkeypatch.setenv("NEUROMOD_PLAN", "expand")  # torch's product may sum anew with more threads
    first = results(name, call)
    for threads in (2, 4, 3):
        torch.set_num_threads(threads)
        assert same(first, results(name, call)), f"{threads} threads"


@pytest.mark.parametrize("name", _ops.NAMES)
def test_repeats_on_every_backend(name: str, backend: Backend) -> None:
    op = OPS[name]
    for i in range(4):
        draw = Draw(f"again/{name}/{i}", op.dtypes[i % len(op.dtypes)], backend.device)
        call = op.draw(draw, 20_000)
        copies = [
            Call([None if t is None else t.clone() for t in call.tensors], call.others)
            for _ in range(3)
        ]
        first, *others = [op.run(backend.op(name), each) for each in copies]
        for other in others:
            assert same(first, other), draw


@pytest.mark.parametrize(
    "name", [name for name in _ops.NAMES if name.startswith("manifold_linear")]
)
def test_samples_do_not_depend_on_their_neighbours(name: str) -> None:
    """A row's result is the same bits in another batch position (what is not summed over it)."""
    if name.endswith(("grad_basis", "update_")):
        pytest.skip("sums over the batch")
    call = OPS[name].large(Draw(f"rows/{name}", torch.float32))
    whole = results(name, call)[0]
    batched = {
        "manifold_linear": (0, 2),
        "manifold_linear_grad_input": (0, 2),
        "manifold_linear_grad_coeff": (0, 1),
        "manifold_linear_backward": (0, 1, 3),
        "manifold_linear_local": (0, 2, 3),
        "manifold_linear_local_backward": (0, 1, 3, 4),
    }
    order = torch.randperm(len(whole))
    moved = [t[order] if i in batched[name] else t for i, t in enumerate(call.tensors)]
    assert torch.equal(results(name, Call(moved, call.others))[0], whole[order])
