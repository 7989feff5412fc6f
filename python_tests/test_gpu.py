"""What only a GPU can show: ``make gpu STAGE=stress``. Races, graphs, streams, leaks, huge tensors.

That results are right, and all that operands may be, is tested by the other files on the backend
``cuda``, which joins where there is a GPU.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from bounds import check
from compositions import ALL, CENTRAL, Composition, every
from entry import Call
from fly_entries import certain_units
from op_entries import OPS
from sampling import Draw, wide
from test_gradients import leaves, verify
from test_opcheck import ALL_FOUR, leaf
from torch import Tensor

import neuromod_ext as nm
from neuromod_ext import _ops
from neuromod_ext.optim import ManifoldSGD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
every_op = pytest.mark.parametrize("name", _ops.NAMES)


def large(name: str, dtype: torch.dtype = torch.float32) -> Call:
    return OPS[name].large(Draw(f"gpu/{name}", dtype, "cuda"))


def results(name: str, call: Call) -> list[Tensor]:
    """Of one call, which changes nothing of ``call``."""
    return OPS[name].run(_ops.OPS[name], call.map(torch.clone) if OPS[name].mutates else call)


def differs(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Whether a bit differs, known to the device alone: nothing waits for it."""
    return torch.stack([(a != b).any() for a, b in zip(first, second, strict=True)]).any()


@every_op
def test_races(name: str) -> None:
    """250 repeats, all dtypes, with nothing between them that would wait."""
    for dtype in OPS[name].dtypes:
        call = large(name, dtype)
        first = results(name, call)
        wrong = torch.zeros((), dtype=torch.bool, device="cuda")
        for _ in range(250):
            wrong |= differs(first, results(name, call))
        assert not wrong.item(), dtype
        assert all(t.isfinite().all() for t in first)


@every_op
def test_graph(name: str) -> None:
    """100 replays of a captured call, whose operands change between them."""
    op, call = OPS[name], large(name)
    captured, eager = call.map(torch.clone), call.map(torch.clone)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.run(_ops.OPS[name], call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = op.run(_ops.OPS[name], captured)
    for i in range(100):
        graph.replay()
        want = op.run(_ops.OPS[name], eager)
        assert not differs(got, want).item(), i
        for a, b in zip(captured.tensors, eager.tensors, strict=True):
            if a is not None and a.is_floating_point():
                a.mul_(-0.9375), b.mul_(-0.9375)


def test_a_captured_step_takes_the_rate_of_the_day() -> None:
    """Thirty parameters, two launches; between replays the rate and the gradients change."""

    def parameters() -> list[torch.nn.Parameter]:
        draw = Draw("captured", torch.float32, "cuda")
        made = [torch.nn.Parameter(draw.tensor(3, 500 + i)) for i in range(30)]
        for p in made:
            p.manifold, p.grad = nm.Ellipse(), draw.tensor(*p.shape)
        return made

    ours, others = parameters(), parameters()
    captured = ManifoldSGD(ours, 0.1, momentum=0.9, nesterov=True, capturable=True)
    eager = ManifoldSGD(others, 0.1, momentum=0.9, nesterov=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for i in range(20):
        rate = 0.1 / (1 + i)
        captured.param_groups[0]["lr"].fill_(rate)
        eager.param_groups[0]["lr"] = rate
        for p in (*ours, *others):
            p.grad.mul_(-0.9375)
        graph.replay()
        eager.step()
        assert not differs(ours, others).item(), i


@every_op
def test_streams(name: str) -> None:
    """1,000 calls on each of two side streams, in turns, each with operands of its own."""
    calls = [large(name), OPS[name].large(Draw(f"gpu/other/{name}", torch.float32, "cuda"))]
    first = [results(name, call) for call in calls]
    wrong = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(1000):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                wrong[i] |= differs(first[i], results(name, calls[i]))
    torch.cuda.synchronize()
    assert not any(w.item() for w in wrong)


@every
def test_nothing_is_kept(entry: Composition) -> None:
    """What is allocated after 1,000 forward and backward passes is what was before."""
    inputs = leaves(entry.make(Draw(f"gpu/{entry.id}", device="cuda"), 3))

    def once() -> None:
        torch.autograd.grad(entry.call(*inputs).sum(), inputs, allow_unused=True)

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        once()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@every
def test_derivatives(entry: Composition, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits each time: also where convolutions are cuDNN's, which need not be."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    verify(entry.call, leaves(entry.make(Draw(f"gpu/{entry.id}", device="cuda"), 2)))


@pytest.mark.parametrize("entry", [e for e in ALL if e.id in CENTRAL], ids=lambda e: e.id)
def test_compile(entry: Composition) -> None:
    """Forward and backward, without a break of the graph."""
    inputs = leaves(entry.make(Draw(f"gpu/{entry.id}", device="cuda"), 3))
    backend = "inductor" if entry.id == "ManifoldLinear-ellipse" else "aot_eager"  # which is quick
    compiled = torch.compile(entry.call, fullgraph=True, backend=backend)

    def both(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = function(*inputs)
        return out, *torch.autograd.grad(out.sin().sum(), inputs)

    for got, want in zip(both(compiled), both(entry.call), strict=True):
        torch.testing.assert_close(got, want)


@every_op
def test_opcheck(name: str) -> None:
    op = OPS[name]
    call = op.draw(Draw(f"gpu/opcheck/{name}", op.dtypes[0], "cuda"), 2_000)
    tensors = [t if t is None else leaf(t, op.differentiable) for t in call.tensors]
    arguments = tuple(op.lists(tensors))
    torch.library.opcheck(_ops.OPS[name], arguments, call.others, test_utils=ALL_FOUR)


# More than 2^31 elements

SUBSCRIPTS = {
    "manifold_linear": (("bi", "koi", "bk"), "bo"),
    "manifold_linear_grad_input": (("bo", "koi", "bk"), "bi"),
    "manifold_linear_grad_basis": (("bo", "bi", "bk"), "koi"),
    "manifold_linear_grad_coeff": (("bo", "bi", "koi"), "bk"),
    "manifold_linear_update_": (("koi", "bo", "bi", "bk"), "koi"),
    "interpolate_weights": (("kn", "bk"), "bn"),
    "interpolate_weights_grad_basis": (("bn", "bk"), "kn"),
    "interpolate_weights_grad_coeff": (("bn", "kn"), "bk"),
    "manifold_step_": (("kn", "kn", "kn", "kk"), "kn"),
    "manifold_metric": (("nk", "n"), "kk"),
}
WIDE_INPUT = {"b": 2**21 + 1, "i": 1024, "o": 8, "k": 2}
WIDE_OUTPUT = {"b": 2**21 + 1, "i": 8, "o": 1024, "k": 2}
WIDE_BASIS = {"b": 3, "i": 2**15, "o": 2**15 + 1, "k": 2}
WIDE_COEFF = {"b": 2**30 + 1, "i": 1, "o": 1, "k": 2}
COLUMNS = {"b": 2, "n": 2**30 + 3, "k": 2}
LARGE_CARD = 79e9  # bytes: no case needs as many
HUGE = [
    *[(name, WIDE_INPUT, "b") for name in SUBSCRIPTS if name.startswith("manifold_linear")],
    *[(name, WIDE_OUTPUT, "b") for name in SUBSCRIPTS if name.startswith("manifold_linear")],
    *[(name, WIDE_BASIS, "o") for name in SUBSCRIPTS if name.startswith("manifold_linear")],
    ("manifold_linear", WIDE_COEFF, "b"),
    ("manifold_linear_grad_coeff", WIDE_COEFF, "b"),
    *[(name, COLUMNS, "n") for name in SUBSCRIPTS if not name.startswith("manifold_linear")],
]


def make_room(needed: int) -> None:
    """Skips where a card is too small; a large one that is full was not given all back."""
    gc.collect()
    torch.cuda.empty_cache()  # what torch keeps for other tests counts as taken
    free, total = torch.cuda.mem_get_info()
    if free < needed:
        GiB = [round(count / 2**30) for count in (needed, free, total)]
        reason = "needs {} GiB; {} of {} are free".format(*GiB)
        assert total < max(LARGE_CARD, needed), reason
        pytest.skip(reason)


def chosen(size: int) -> Tensor:
    """Some positions, the first and the last among them."""
    some = torch.randint(size, (60,), generator=torch.Generator().manual_seed(0))
    return torch.cat([some, torch.tensor([0, size - 2, size - 1])]).unique().cuda()


def part(t: Tensor, letters: str, letter: str, at: Tensor) -> Tensor:
    for dim, name in enumerate(letters):
        t = t.index_select(dim, at) if name == letter else t
    return t.contiguous()


@pytest.mark.parametrize(
    ("name", "sizes", "letter"),
    HUGE,
    ids=[f"{name}-{'-'.join(map(str, sizes.values()))}" for name, sizes, _ in HUGE],
)
def test_huge(name: str, sizes: dict[str, int], letter: str) -> None:
    """Compared where chosen; where the letter is summed over, all else is 0."""
    op, (roles, result) = OPS[name], SUBSCRIPTS[name]
    numel = [torch.Size(sizes[s] for s in letters).numel() for letters in (*roles, result)]
    needed = 9 * max(numel) + 3 * sum(numel)
    make_room(needed)
    assert max(numel) > 2**31 - 2**22 or name == "manifold_step_"
    at, dtype = chosen(sizes[letter]), torch.bfloat16 if "metric" not in name else torch.float32
    tensors = []
    for letters in roles:
        kind = wide(dtype) if letters in ("bk", "kk", "nk", "n") else dtype
        t = torch.randn([sizes[s] for s in letters], dtype=kind, device="cuda")
        first = letter in letters and letter not in "".join(roles[: len(tensors)])
        if first and letter not in result:
            few = part(t, letters, letter, at)
            t.zero_().index_copy_(letters.index(letter), at, few)
        tensors.append(t)
    numbers = {"lr": 0.1, "momentum": 0.9} if name == "manifold_step_" else {}
    call = Call(tensors, numbers)
    small = Call([part(t, s, letter, at) for t, s in zip(tensors, roles, strict=True)], numbers)
    want = op.expected(small)
    for got, expected in zip(op.run(_ops.OPS[name], call), want, strict=True):
        check(part(got, result, letter, at), expected, name)


CONVOLUTIONS = {  # samples, channels of x and y, height and width; side of the kernel
    "input": ((2**13 + 1, 64, 8, 64, 64), 3),
    "output": ((2**13 + 1, 8, 64, 64, 64), 3),
    "pixels": ((1, 64, 64, 2**13, 2**12 + 3), 3),
    "basis": ((3, 2**15, 2**15 + 8, 2, 2), 1),
}
NUM_BASIS = 2


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_huge_convolution(name: str) -> None:
    (B, C, O, H, W), side = CONVOLUTIONS[name]
    x, y, P = B * C * H * W, B * O * H * W, NUM_BASIS * O * C * side**2
    make_room(6 * (x + y) + 10 * P)  # each twice more as rows or gradient; sums of dP in float32
    assert max(x, y, P) > 2**31
    compare_convolution(CONVOLUTIONS[name][0], side, _ops.OPS, "cuda")


def compare_convolution(
    sizes: tuple[int, ...], side: int, ops: Mapping[str, Callable[..., Any]], device: str
) -> None:
    """In the last corner of the first, a middle and the last sample, of such channels of y.

    Elsewhere the gradient of y is 0, so that the corners are all that sums are made of.
    """
    (B, C, O, H, W), pad, dtype = sizes, side // 2, torch.bfloat16
    samples, channels = ([*{0, n // 2, n - 1}] for n in (B, O))
    corner = (..., slice(-9, None), slice(-9, None))
    options = {"stride": [1, 1], "padding": [pad, pad], "dilation": [1, 1], "groups": 1}

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def corners(t: Tensor) -> Tensor:
        return torch.stack([t[b][corner] for b in samples])

    x, P = normal(B, C, H, W), normal(NUM_BASIS, O, C, side, side)
    coeff, bias = normal(B, NUM_BASIS, dtype=torch.float32), normal(NUM_BASIS, O)
    few = [corners(x), P[:, channels], coeff[samples], bias[:, channels]]

    forward = OPS["manifold_conv"]
    (y,) = forward.run(ops[forward.name], Call([x, P, coeff, bias], options))
    (want,) = forward.expected(Call(few, options))
    seen = (..., slice(pad, None), slice(pad, None))  # what depends on the corner of x alone
    parts = {name: getattr(want, name)[seen] for name in ("value", "scale", "flushed")}
    check(corners(y)[:, channels][seen], replace(want, **parts), "y")

    grad = y.zero_()
    given = torch.zeros_like(corners(y)[:, channels])
    given[seen] = torch.randn_like(given[seen])
    for b, rows in zip(samples, given, strict=True):
        for o, row in zip(channels, rows, strict=True):
            grad[b, o][corner] = row
    backward, options = OPS["manifold_conv_backward"], options | {"needed": [True] * 4}
    got = backward.run(ops[backward.name], Call([grad, x, P, coeff, bias], options))
    got = [corners(got[0]), got[1][:, channels], got[2][samples], got[3][:, channels]]
    wanted = backward.expected(Call([given, *few], options))
    for role, result, want in zip("xPcb", got, wanted, strict=True):
        check(result, want, role)


FLY = {"input": (2**21 + 1, 1024, 8), "hidden": (2**18 + 1, 16, 2**13)}  # samples, inputs, units


@pytest.mark.parametrize("name", FLY)
def test_huge_fly_hash(name: str) -> None:
    B, I, H = FLY[name]
    make_room(6 * B * (I + H))
    assert B * max(I, H) > 2**31
    compare_fly_hash(FLY[name], _ops.OPS, "cuda")


def compare_fly_hash(
    sizes: tuple[int, ...], ops: Mapping[str, Callable[..., Any]], device: str
) -> None:
    """The first, a middle and the last sample, and their gradients."""
    (B, I, H), samples = sizes, [0, sizes[0] // 2, sizes[0] - 1]
    x = torch.randn(B, I, dtype=torch.bfloat16, device=device)
    index, few = torch.randint(I, (H, 3), device=device), x[samples]
    forward, backward = OPS["fly_hash"], OPS["fly_hash_backward"]
    (h,) = forward.run(ops[forward.name], Call([x, index]))
    check(h[samples], forward.expected(Call([few, index]))[0], "h")
    grad = h.normal_()
    certain = torch.from_numpy(certain_units(few, index)).to(device)
    grad[samples] *= certain  # rounding decides about the other units
    (dx,) = backward.run(ops[backward.name], Call([grad, x, index]))
    check(dx[samples], backward.expected(Call([grad[samples], few, index]))[0], "x")
