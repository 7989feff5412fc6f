"""fly_hash and fly_readout beyond the generic tests: ties, ranges, independence of samples."""

import numpy as np
import pytest
import torch
from conftest import Backend
from sampling import Draw
from torch import Tensor

import neuromod_ext.functional as MF
from neuromod_ext._ops import OPS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operands(d: Draw, B: int = 70, T: int | None = None, I: int = 23, H: int = 700, O: int = 5):
    index = torch.randint(0, I, (H, 7), generator=d.generator)
    gain = d.tensor(H) if T is None else d.tensor(T, H)
    task = None if T is None else torch.randint(0, T, (B,), generator=d.generator)
    return d.tensor(B, I), index, gain, d.tensor(O, H), task


def dense(x: Tensor, index: Tensor) -> Tensor:
    """h, as the dense code of the paper computes it."""
    S = torch.zeros(index.shape[0], x.shape[1], dtype=x.dtype)
    S.scatter_add_(1, index, torch.ones_like(index, dtype=x.dtype))
    m = x @ S.mT
    return torch.relu(m - m.mean(1, keepdim=True))


@pytest.mark.parametrize("O", [2, 5, 10])  # 2, or with AVX-512 10, stay in registers
@pytest.mark.parametrize("B", [1, 15, 16, 17, 32, 33, 300])
def test_against_the_dense_code(B: int, O: int) -> None:
    """Blocks that are full, and not; several panels of samples; several slices of units."""
    d = Draw(f"dense/{B}/{O}")
    x, index, v, R, _ = operands(d, B, H=4200, O=O)
    leaves = [t.requires_grad_() for t in (x, v, R)]
    grad = d.tensor(B, O)
    got = MF.fly_readout(x, index, v, R)
    want = (dense(x, index) * v) @ R.mT
    torch.testing.assert_close(MF.fly_hash(x, index), dense(x, index), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_the_hash_read_out(dtype: torch.dtype) -> None:
    x, index, v, R, task = operands(Draw("fused", torch.float64), T=3)
    h = MF.fly_hash(x.to(dtype).double(), index)
    want = (h * v.to(dtype).double()[task]) @ R.to(dtype).double().mT
    got = MF.fly_readout(x.to(dtype), index, v.to(dtype), R.to(dtype), task)
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("O", [2, 5, 10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_task_is_a_batch_of_that_task(dtype: torch.dtype, O: int) -> None:
    """To the bit: what a sample gives depends neither on its neighbours nor on their tasks."""
    x, index, v, R, task = operands(Draw(f"tasks/{O}", dtype), 101, T=4, O=O)
    mixed = MF.fly_readout(x, index, v, R, task)
    order = torch.randperm(len(x))
    assert torch.equal(MF.fly_readout(x[order], index, v, R, task[order]), mixed[order])
    for t in range(4):
        assert torch.equal(MF.fly_readout(x, index, v[t], R)[task == t], mixed[task == t])
    for b in (0, 50, 100):
        assert torch.equal(MF.fly_readout(x[b : b + 1], index, v[task[b]], R)[0], mixed[b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int32_and_int64_indices_are_the_same(dtype: torch.dtype) -> None:
    x, index, v, R, _ = operands(Draw("int", dtype))
    assert torch.equal(MF.fly_readout(x, index, v, R), MF.fly_readout(x, index.int(), v, R))
    assert torch.equal(MF.fly_hash(x, index), MF.fly_hash(x, index.int()))


@pytest.mark.parametrize("case", ["one unit", "one input", "equal units", "constant input"])
def test_units_at_the_threshold(case: str) -> None:
    """All activities are equal, so h is 0 up to rounding, and nothing depends on gain or input."""
    x = torch.randn(40, 6, dtype=torch.float64)
    index = torch.randint(0, 6, (50, 7))
    if case == "one unit":
        index = index[:1]
    elif case == "one input":
        x, index = x[:, :1], torch.zeros_like(index)
    elif case == "equal units":
        index = index[:1].expand(50, 7)
    else:
        x = torch.full_like(x, 3.7)
    H = len(index)
    h = MF.fly_hash(x, index)
    bound = 2.0**-53 * 2 * (7 + 6 + 16) * (x.abs().amax() * 14)
    assert h.min() >= 0
    assert h.max() <= bound
    v, R = torch.randn(H, dtype=torch.float64), torch.randn(3, H, dtype=torch.float64)
    y = MF.fly_readout(x, index, v, R)
    assert y.abs().max() <= bound * (v.abs() * R.abs()).sum(1).max() * 2
    grads = OPS["fly_readout_backward"](
        torch.ones(40, 3).double(), x, index, v, R, None, [True] * 3
    )
    assert all(g.isfinite().all() for g in grads)
    assert grads[1].abs().max() <= bound * 40 * R.abs().sum(0).max() * 2


def test_gradient_of_the_input_sums_to_zero_over_equal_shifts() -> None:
    """Shifting a sample by a constant moves no activity: each row of dx sums to 0."""
    x, index, v, R, _ = operands(Draw("shift"))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(MF.fly_readout(x, index, v, R).sin().sum(), x)
    assert grad.sum(1).abs().max() < 1e-10 * grad.abs().max()
    assert grad.abs().max() > 0.01


@pytest.mark.parametrize("value", [-1, 23, 2**40, -(2**63), 2**32])
def test_index_out_of_range(value: int) -> None:
    x, index, v, R, _ = operands(Draw("range"))
    index[411, 3] = value
    words = rf"expected index with entries in \[0, I\) = \[0, 23\), got {value}$"
    with pytest.raises(ValueError, match="fly_hash: " + words):
        MF.fly_hash(x, index)
    with pytest.raises(ValueError, match="fly_readout: " + words):
        MF.fly_readout(x, index, v, R)
    with pytest.raises(ValueError, match="fly_hash_backward: " + words):
        OPS["fly_hash_backward"](torch.ones(70, 700).double(), x, index)
    with pytest.raises(ValueError, match="fly_readout_backward: " + words):
        OPS["fly_readout_backward"](torch.ones(70, 5).double(), x, index, v, R, None, [True] * 3)
    if abs(value) < 2**31:
        with pytest.raises(ValueError, match="fly_hash: " + words):
            MF.fly_hash(x, index.int())


@pytest.mark.parametrize("value", [-1, 4, 2**40])
def test_task_out_of_range(value: int) -> None:
    x, index, v, R, task = operands(Draw("task"), T=4)
    task[69] = value
    words = rf"expected task with entries in \[0, T\) = \[0, 4\), got {value}$"
    with pytest.raises(ValueError, match="fly_readout: " + words):
        MF.fly_readout(x, index, v, R, task)
    with pytest.raises(ValueError, match="fly_readout_backward: " + words):
        OPS["fly_readout_backward"](torch.ones(70, 5).double(), x, index, v, R, task, [True] * 3)


def test_out_of_range_on_cuda(backend: Backend) -> None:
    """Nobody looks before the kernel runs: what would be read out of range is NaN."""
    if backend.name == "cpu":
        pytest.skip("the CPU's kernel looks, and raises")
    given = operands(Draw("cuda"), T=4)
    x, index, v, R, task = (t.to(backend.device) for t in given if t is not None)
    task[5] = 4
    y = backend.op("fly_readout")(x, index, v, R, task)
    assert y[5].isnan().all()
    assert y[:5].isfinite().all()
    for value in (-1, 23, 2**40):
        bad = index.clone()
        bad[411, 3] = value
        assert backend.op("fly_hash")(x, bad).isnan().all()
        assert backend.op("fly_readout")(x, bad, v[0], R, None).isnan().all()


@pytest.mark.parametrize(
    "shape", [(0, 4, 6, 2, 3), (3, 4, 0, 2, 3), (3, 4, 6, 0, 3), (3, 4, 6, 2, 0)]
)
def test_empty(shape: tuple[int, ...]) -> None:
    B, I, H, n, O = shape
    x = torch.randn(B, I, requires_grad=True)
    index = torch.zeros(H, n, dtype=torch.int64)
    v, R = torch.randn(H, requires_grad=True), torch.randn(O, H, requires_grad=True)
    assert torch.equal(MF.fly_hash(x, index), torch.zeros(B, H))
    y = MF.fly_readout(x, index, v, R)
    assert torch.equal(y, torch.zeros(B, O))
    y.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (x, v, R))


def test_unused_inputs_do_not_matter() -> None:
    """NaN in an input that no unit has reaches nothing; in another, all of its sample."""
    x, index, v, R, _ = operands(Draw("unused"))
    index[index == 7] = 8
    clean = MF.fly_readout(x, index, v, R)
    x[3, 7] = np.nan
    assert torch.equal(MF.fly_readout(x, index, v, R), clean)
    x[3, 8] = np.nan
    y = MF.fly_readout(x, index, v, R)
    assert y[3].isnan().all()
    assert torch.equal(y[:3], clean[:3])
    assert torch.equal(y[4:], clean[4:])


def test_gain_linear_scales_either_operand() -> None:
    """The same map, whether the input or the weight is the smaller one."""
    d = Draw("gain_linear")
    W, v = d.tensor(5, 7), d.tensor(7)
    for B in (2, 300):
        x = d.tensor(B, 7)
        torch.testing.assert_close(MF.gain_linear(x, v, W), (x * v) @ W.mT)
    with pytest.raises(ValueError, match=r"gain_linear: expected gain of shape \[I\] = \[7\], got"):
        MF.gain_linear(x, v[:1], W)
    with pytest.raises(ValueError, match=r"expected task of shape \[B\] = \[300\], got \[2\]"):
        MF.gain_linear(x, v.expand(3, 7), W, task=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(IndexError):
        MF.gain_linear(x, v.expand(3, 7), W, task=torch.full((300,), 3))
