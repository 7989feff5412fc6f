"""manifold_step_foreach_: many parameters in one call are stepped as each by itself, to the bit."""

import pytest
import torch
from conftest import Backend
from op_entries import step_call
from sampling import DTYPES, LAYOUTS, Draw, placed
from torch import Tensor

import neuromod_ext.functional as MF

NUMBERS = {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01, "nesterov": True}
Operands = list[list[Tensor]]


def operands(draw: Draw, count: int) -> Operands:
    """Params, grads, buffers and inverses; more tensors than a launch takes, of many sizes."""
    tile = 2048 // draw.dtype.itemsize
    lengths = (1, 3, tile, tile - 1, 2 * tile + 5)
    layouts = [name for name in LAYOUTS if name != "expanded"]
    calls = [
        step_call(draw, 1 + i % 7, (lengths[i % len(lengths)],), True, i % 4 > 0)
        for i in range(count)
    ]
    return [
        [None if t is None else placed(t, layouts[i % len(layouts)]) for i, t in enumerate(role)]
        for role in zip(*(call.tensors for call in calls), strict=True)
    ]


def copied(lists: Operands) -> Operands:
    return [[None if t is None else t.clone() for t in role] for role in lists]


def rate(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first_step", [False, True])
def test_is_each_by_itself(dtype: torch.dtype, first_step: bool, backend: Backend) -> None:
    many = operands(Draw("foreach", dtype, backend.device), 53)
    one = copied(many)
    for there in ("cpu", backend.device):
        lr = rate(0.1, there)
        backend.op("manifold_step_foreach_")(*many, lr, first_step=first_step, **NUMBERS)
        for each in zip(*one, strict=True):
            backend.op("manifold_step_")(*each, lr=0.1, first_step=first_step, **NUMBERS)
        for got, want in zip(many[0] + many[2], one[0] + one[2], strict=True):
            assert torch.equal(got, want)


def test_the_rate_is_what_the_tensor_holds(backend: Backend) -> None:
    P, g = torch.ones(2, 3, device=backend.device), torch.ones(2, 3, device=backend.device)
    lr = rate(0.5, backend.device)
    for want in (0.5, 0.25):
        backend.op("manifold_step_foreach_")([P], [g], [], [None], lr)
        lr.fill_(0.25)
        assert torch.equal(P, torch.full_like(P, want))


def test_numbers_and_tensors_of_any_width_are_rates() -> None:
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25]), rate(0.25)):
        P = torch.ones(2, 3)
        MF.manifold_step_foreach_([P], [torch.ones(2, 3)], lr=lr)
        assert torch.equal(P, torch.full((2, 3), 0.75))
    MF.manifold_step_foreach_([], [], lr=0.1)


def test_shared_memory_is_refused(backend: Backend) -> None:
    """And nothing is written; what is only read may be shared."""
    op = backend.op("manifold_step_foreach_")
    base = torch.arange(12.0, device=backend.device)
    before = base.clone()
    P, Q, last = base[:6].view(2, 3), base[3:9].view(2, 3), base[6:].view(2, 3)
    g, G = torch.ones_like(P), torch.eye(2, device=backend.device)
    lr, none = rate(0.1, backend.device), [None, None]
    square = base[8:].view(2, 2)
    for arguments, words in (
        (([P, P], [g, g], [], none), r"params\[1\] .* overlaps params\[0\]"),
        (([P, Q], [g, g], [], none), r"params\[1\] .* overlaps params\[0\]"),
        (([P, last], [g, P], [], none), r"grads\[1\] .* overlaps params\[0\]"),
        (([Q], [P], [], [None]), r"grads\[0\] .* overlaps params\[0\]"),
        (([P, g], [g, last], [], none), r"grads\[0\] .* overlaps params\[1\]"),
        (([P], [g], [last[:1].expand(2, 3)], [None]), r"momentum_buffers\[0\] without overlapping"),
        (([last], [g], [], [square]), r"metric_inverses\[0\] .* overlaps params\[0\]"),
    ):
        with pytest.raises(ValueError, match=f"manifold_step_foreach_: expected {words}"):
            op(*arguments, lr)
        assert torch.equal(base, before)
    op([P, last], [g, g], [], [G, G], lr)
    assert torch.equal(base, before - 0.1)


def test_autograd_sees_the_change() -> None:
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    losses = [(P * P).sum() for P in params]
    MF.manifold_step_foreach_(params, [torch.ones(2, 3)] * 2, lr=0.1)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_compile_changes_its_inputs() -> None:
    def update(params, grads, buffers, lr):
        MF.manifold_step_foreach_(params, grads, buffers, lr=lr, momentum=0.9)

    draw = Draw("compile")
    lists = [[draw.tensor(3, 5), draw.tensor(2, 4)] for _ in range(3)]
    want = copied(lists)
    update(*want, rate(0.1))
    torch.compile(update, fullgraph=True, backend="aot_eager")(*lists, rate(0.1))
    for got, expected in zip(lists[0] + lists[2], want[0] + want[2], strict=True):
        assert torch.equal(got, expected)


def test_bad_calls() -> None:
    good = {"params": [torch.ones(2, 3)], "grads": [torch.ones(2, 3)], "lr": 0.1}
    for change, words in (
        ({"params": [1.0]}, r"params\[0\] to be a Tensor, got float"),
        ({"momentum_buffers": [None]}, r"momentum_buffers\[0\] to be a Tensor, got NoneType"),
    ):
        with pytest.raises(TypeError, match=f"manifold_step_foreach_: expected {words}"):
            MF.manifold_step_foreach_(**good | change)
    with pytest.raises(ValueError, match="expected lr to be finite, got nan"):
        MF.manifold_step_foreach_(**good | {"lr": float("nan")})
    with pytest.raises(NotImplementedError, match=r"no torch\.func transform"):
        torch.vmap(lambda p, g: MF.manifold_step_foreach_([p], [g], lr=0.1))(
            torch.ones(2, 3, 4), torch.ones(2, 3, 4)
        )


def negated(t: Tensor) -> Tensor:
    """t, of which torch has only noted that it is to be negated."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg() and torch.equal(view, t)
    return view


def test_pending_negations() -> None:
    P, g, m = (torch.rand(3, 8) for _ in range(3))
    inverse = torch.rand(3, 3)
    want = MF.manifold_step_(P.clone(), g, None, inverse, lr=0.5)
    one, many = P.clone(), P.clone()
    MF.manifold_step_(one, negated(g), None, negated(inverse), lr=0.5)
    MF.manifold_step_foreach_([many], [negated(g)], (), [negated(inverse)], lr=0.5)
    assert torch.equal(one, want) and torch.equal(many, want)
    for call in (
        lambda: MF.manifold_step_(negated(P), g, lr=0.5),
        lambda: MF.manifold_step_(P.clone(), g, negated(m), lr=0.5, momentum=0.9),
    ):
        with pytest.raises(ValueError, match="without a pending negation, got one"):
            call()
