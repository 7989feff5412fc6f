"""fly_readout: FlyNet's hidden layer and readout, in the sizes of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.correctness import Expected, expect
from benchmarks.speed.limits import Work
from benchmarks.speed.problem import (
    BACKWARD,
    FORWARD,
    Draw,
    Group,
    Layout,
    Problem,
    Variant,
    both,
    public,
)

FAN_IN = 7
GOALS = {64: 3.0, 256: 3.5, 1024: 5.0}  # forward, by samples


def fly_readout(dtype: torch.dtype, quick: bool) -> Iterator[Group]:
    """Modulated fly hashes, read out; backward yields the gradient of the gain, what is trained."""
    for B in (9,) if quick else GOALS:
        I, H, O = (16, 40, 3) if quick else (784, 7840, 10)
        shape = {"B": B, "I": I, "H": H, "O": O}
        goals = both() if quick else both(GOALS[B], 2.0)
        yield Group("fly_readout", shape, dtype, goals, partial(problem, B, I, H, O, dtype))


def problem(B: int, I: int, H: int, O: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """B samples of I inputs, H units, O outputs."""
    draw = Draw(dtype, device)
    keys = torch.rand(H, I, generator=draw.generator)
    operands = {
        "input": draw.normal(B, I),
        "index": keys.argsort(1)[:, :FAN_IN].sort(1).values.int().to(device),  # as in nn.FlyHash
        "gain": draw.normal(H),
        "readout": draw.normal(O, H),
    }
    grad_output, each = draw.normal(B, O), operands["input"].element_size()
    moved = (B * (I + O) + (O + 1) * H) * each + 4 * FAN_IN * H
    # An addition takes the place of a multiply-add. What is gathered, the inputs, lies in cache.
    unit = FAN_IN + O
    work = {
        FORWARD: Work(2 * B * H * unit, moved, (B, H, O)),
        BACKWARD: Work(2 * B * H * (2 * unit + 1), 2 * moved, (B, H, O)),
    }
    matrix = {"index": Layout(partial(binary, inputs=I, dtype=dtype), lambda dense: dense)}
    sparse = {
        "index": Layout(lambda index: binary(index, I, dtype).to_sparse_csr(), lambda csr: csr)
    }
    return Problem(
        operands,
        [
            Variant("neuromod_ext", public("fly_readout"), "ours"),
            Variant("dense", dense, layouts=matrix),
            Variant("embedding_bag", embedding_bag),
            Variant("embedding_bag, in place", embedding_bag_in_place),
            Variant("index_select", gathered),
            Variant("sparse matrix", sparse_matrix, layouts=sparse),
        ],
        partial(_expected, operands, grad_output),
        work,
        grad_output,
        ("gain",),
    )


def _expected(operands: dict[str, Tensor], grad_output: Tensor) -> dict[str, Expected]:
    x, index, v, R = (operands[name] for name in ("input", "index", "gain", "readout"))
    S = binary(index, x.shape[1], torch.float64)
    m, size = x.double() @ S.mT, x.double().abs() @ S.mT
    h, bound = (m - m.mean(1, keepdim=True)).relu(), size + size.mean(1, keepdim=True)
    terms = x.shape[1] + FAN_IN
    return {
        "output": expect("bj,j,oj->bo", (h, v, R), terms + len(index), (bound, v.abs(), R.abs())),
        "gain": expect(
            "bj,bo,oj->j",
            (h, grad_output, R),
            terms + len(x) + len(R),
            (bound, grad_output.abs(), R.abs()),
        ),
    }


def binary(index: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """S, which has a one for each input of a unit, [H, I]."""
    zeros = torch.zeros(len(index), inputs, dtype=dtype, device=index.device)
    return zeros.scatter_(1, index.long(), 1)


def dense(input: Tensor, index: Tensor, gain: Tensor, readout: Tensor) -> Tensor:
    """The paper's code: a product with the binary matrix, which stands in ``index``."""
    m = F.linear(input, index)
    h = torch.relu(m - m.mean(1, keepdim=True))
    return F.linear(h * gain, readout)


def embedding_bag(input: Tensor, index: Tensor, gain: Tensor, readout: Tensor) -> Tensor:
    """Rows of the transposed input, summed; the gain goes to the smaller operand."""
    m = F.embedding_bag(index, input.mT.contiguous(), mode="sum")
    return ((readout * gain) @ torch.relu(m - m.mean(0))).mT


def embedding_bag_in_place(input: Tensor, index: Tensor, gain: Tensor, readout: Tensor) -> Tensor:
    """The same, which writes the hidden layer once: for inputs that need no gradient."""
    m = F.embedding_bag(index, input.mT.contiguous(), mode="sum")
    return ((readout * gain) @ torch.relu_(m.sub_(m.mean(0)))).mT


def gathered(input: Tensor, index: Tensor, gain: Tensor, readout: Tensor) -> Tensor:
    """One gather for each of a unit's inputs."""
    rows = input.mT.contiguous()
    m = sum(rows.index_select(0, column) for column in index.unbind(1))
    return ((readout * gain) @ torch.relu(m - m.mean(0))).mT


def sparse_matrix(input: Tensor, index: Tensor, gain: Tensor, readout: Tensor) -> Tensor:
    """A product with the binary matrix in CSR, which stands in ``index``."""
    m = index @ input.mT
    return ((readout * gain) @ torch.relu(m - m.mean(0))).mT
