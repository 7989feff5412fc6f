# ruff: noqa: E501  (a table: one call a row)
"""What must be refused alike by several ops: rows of the table in bad_calls.py."""

from typing import Any

import torch
from torch import Tensor

F64, F32, F16, BF16, INT = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
)
Rows = list[tuple[str, dict[str, Any], type[Exception], str]]


def t(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def meta(*shape: int) -> Tensor:
    return t(*shape, device="meta")


G, X = "grad_output", "input"
FLOATING = "of dtype float64, float32, bfloat16 or float16, got"


def linear_rows(
    lead: str, width: int, letter: str, local: bool = False, with_input: bool = False
) -> Rows:
    """What ops that read the basis points have in common: B = 4, K = 3, O = 5, I = 6, L = 2."""
    rows_, basis = f"[B, ..., {letter}]", "[K, O, I]"
    sizes = f"[4, ..., {width}]"
    coeffs, count = ("[B, L]", 2) if local else ("[B, K]", 3)
    low = {
        lead: t(4, width, dtype=BF16),
        "basis": t(3, 5, 6, dtype=BF16),
        "coeff": t(4, count, dtype=BF16),
    }
    return [
        ("rank 1", {lead: t(width)}, ValueError, f"{lead} of shape {rows_}, got [{width}]"),
        ("rank 0", {lead: t()}, ValueError, f"{lead} of shape {rows_}, got []"),
        ("integers", {lead: t(4, width, dtype=INT)}, TypeError, f"{lead} {FLOATING} int64"),
        ("complex", {lead: t(4, width, dtype=torch.complex64)}, TypeError, f"{lead} {FLOATING} complex64"),
        ("width", {lead: t(4, 7)}, ValueError, f"{lead} of shape {rows_} = {sizes}, got [4, 7]"),
        ("token width", {lead: t(4, 2, 1)}, ValueError, f"{lead} of shape {rows_} = {sizes}, got [4, 2, 1]"),
        ("basis rank", {"basis": t(5, 6)}, ValueError, f"basis of shape {basis}, got [5, 6]"),
        ("basis rank 4", {"basis": t(3, 5, 6, 1)}, ValueError, f"basis of shape {basis}, got [3, 5, 6, 1]"),
        ("basis dtype", {"basis": t(3, 5, 6, dtype=F64)}, TypeError,
         f"basis of dtype float32 (that of {lead}), got float64; convert one of them"),
        ("basis device", {"basis": meta(3, 5, 6)}, ValueError,
         f"basis on cpu (where {lead} is), got meta; move one of them"),
        ("no basis point", {"basis": t(0, 5, 6), "coeff": t(4, 0)}, ValueError,
         "basis with at least one basis point (K >= 1), got K = 0"),
        ("coeff rank", {"coeff": t(3)}, ValueError, "coeff of shape [B, K], got [3]"),
        ("coeff dtype", {"coeff": t(4, count, dtype=F64)}, TypeError,
         f"coeff of dtype float32 (in which sums over float32 {lead} run), got float64; "
         "convert it with .to(torch.float32)"),
        ("low coeff", low | {"input": t(4, 6, dtype=BF16)} if with_input else low,
         TypeError, f"coeff of dtype float32 (in which sums over bfloat16 {lead} run), got bfloat16; "
         "convert it with .to(torch.float32)"),
        ("coeff device", {"coeff": meta(4, count)}, ValueError, f"coeff on cpu (where {lead} is), got meta"),
        ("coeff samples", {"coeff": t(5, count)}, ValueError,
         f"coeff of shape {coeffs} = [4, {count}], got [5, {count}]"),
    ]  # fmt: skip


DENSE: Rows = [
    ("coeff points", {"coeff": t(4, 2)}, ValueError, "coeff of shape [B, K] = [4, 3], got [4, 2]"),
]
LOCAL: Rows = [
    ("index dtype", {"index": t(4, dtype=torch.int32)}, TypeError,
     "index of dtype int64, got int32; convert it with .long()"),
    ("floating index", {"index": t(4)}, TypeError, "index of dtype int64, got float32; convert it with .long()"),
    ("index device", {"index": meta(4).long()}, ValueError,
     "index on cpu (where coeff is), got meta; move one of them"),
    ("index rank", {"index": t(4, 2, dtype=INT)}, ValueError, "index of shape [B] = [4], got [4, 2]"),
    ("index samples", {"index": t(3, dtype=INT)}, ValueError, "index of shape [B] = [4], got [3]"),
    ("no coefficient", {"coeff": t(4, 0)}, ValueError,
     "coeff with 1 <= L <= K = 3 coefficients a sample, got L = 0"),
    ("too many coefficients", {"coeff": t(4, 4)}, ValueError,
     "coeff with 1 <= L <= K = 3 coefficients a sample, got L = 4"),
]  # fmt: skip


def bias_rows(lead: str) -> Rows:
    return [
        ("bias shape", {"bias": t(5)}, ValueError, "bias of shape [K, O] = [3, 5], got [5]"),
        ("bias dtype", {"bias": t(3, 5, dtype=F16)}, TypeError,
         f"bias of dtype float32 (that of {lead}), got float16; convert one of them"),
        ("bias device", {"bias": meta(3, 5)}, ValueError, f"bias on cpu (where {lead} is), got meta"),
    ]  # fmt: skip


INPUT_OF_G: Rows = [
    ("input dtype", {"input": t(4, 6, dtype=F64)}, TypeError,
     "input of dtype float32 (that of grad_output), got float64; convert one of them"),
    ("input device", {"input": meta(4, 6)}, ValueError, "input on cpu (where grad_output is), got meta"),
    ("input rank", {"input": t(4, 2, 6)}, ValueError, "input of shape [B, ..., I] = [4, 6], got [4, 2, 6]"),
    ("input width", {"input": t(4, 7)}, ValueError, "input of shape [B, ..., I] = [4, 6], got [4, 7]"),
]  # fmt: skip


def outer_rows() -> Rows:
    """What the ops have in common that sum c g xᵀ over samples: B = 4, K = 3, O = 5, I = 6."""
    return [
        ("rank 1", {"grad_output": t(5)}, ValueError, "grad_output of shape [B, ..., O], got [5]"),
        ("integers", {"grad_output": t(4, 2, 5, dtype=INT)}, TypeError, f"grad_output {FLOATING} int64"),
        ("input dtype", {"input": t(4, 2, 6, dtype=F64)}, TypeError,
         "input of dtype float32 (that of grad_output), got float64; convert one of them"),
        ("input device", {"input": meta(4, 2, 6)}, ValueError, "input on cpu (where grad_output is), got meta"),
        ("input rank", {"input": t(4, 6)}, ValueError, "input of shape [B, ..., I] = [4, 2, 6], got [4, 6]"),
        ("input rank 0", {"input": t()}, ValueError, "input of shape [B, ..., I] = [4, 2, 0], got []"),
        ("input samples", {"input": t(3, 2, 6)}, ValueError, "input of shape [B, ..., I] = [4, 2, 6], got [3, 2, 6]"),
        ("input tokens", {"input": t(4, 3, 6)}, ValueError, "input of shape [B, ..., I] = [4, 2, 6], got [4, 3, 6]"),
        ("coeff rank", {"coeff": t(4)}, ValueError, "coeff of shape [B, K], got [4]"),
        ("coeff dtype", {"coeff": t(4, 3, dtype=F16)}, TypeError,
         "coeff of dtype float32 (in which sums over float32 grad_output run), got float16; convert it with"),
        ("coeff device", {"coeff": meta(4, 3)}, ValueError, "coeff on cpu (where grad_output is), got meta"),
        ("coeff samples", {"coeff": t(2, 3)}, ValueError, "coeff of shape [B, K] = [4, 3], got [2, 3]"),
        ("no basis point", {"coeff": t(4, 0)}, ValueError, "coeff with at least one basis point (K >= 1), got K = 0"),
    ]  # fmt: skip


WALK = {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 1], "groups": 2}
CONV = {
    "input": t(4, 6, 8, 7),
    "basis": t(3, 10, 3, 3, 2),
    "coeff": t(4, 3),
    "bias": t(3, 10),
    **WALK,
}
CONV_LOW = {name: t(*CONV[name].shape, dtype=BF16) for name in ("input", "basis", "coeff", "bias")}


def conv_rows(**low: Tensor) -> Rows:
    """What both ops of manifold_conv refuse: B = 4, K = 3, O = 10, C = 6, 8 x 7 pixels, 3 x 2 taps."""
    basis = "[K, O, C / groups, kH, kW]"
    return [
        ("no space", {"input": t(4, 6)}, ValueError,
         "input of shape [B, C, ...] with one to three dimensions of space, got [4, 6]"),
        ("much space", {"input": t(4, 6, 1, 1, 1, 1)}, ValueError,
         "input of shape [B, C, ...] with one to three dimensions of space, got [4, 6, 1, 1, 1, 1]"),
        ("integers", {"input": t(4, 6, 8, 7, dtype=INT)}, TypeError, f"input {FLOATING} int64"),
        ("basis rank", {"basis": t(3, 10, 3, 3)}, ValueError, f"basis of shape {basis}, got [3, 10, 3, 3]"),
        ("basis rank 1d", {"input": t(4, 6, 8)}, ValueError, "basis of shape [K, O, C / groups, kL], got [3, 10, 3, 3, 2]"),
        ("basis rank 3d", {"input": t(4, 6, 8, 7, 2)}, ValueError,
         "basis of shape [K, O, C / groups, kD, kH, kW], got [3, 10, 3, 3, 2]"),
        ("basis dtype", {"basis": t(3, 10, 3, 3, 2, dtype=F64)}, TypeError,
         "basis of dtype float32 (that of input), got float64; convert one of them"),
        ("basis device", {"basis": meta(3, 10, 3, 3, 2)}, ValueError, "basis on cpu (where input is), got meta"),
        ("no basis point", {"basis": t(0, 10, 3, 3, 2), "coeff": t(4, 0)}, ValueError,
         "basis with at least one basis point (K >= 1), got K = 0"),
        ("coeff rank", {"coeff": t(3)}, ValueError, "coeff of shape [B, K], got [3]"),
        ("coeff samples", {"coeff": t(5, 3)}, ValueError, "coeff of shape [B, K] = [4, 3], got [5, 3]"),
        ("coeff points", {"coeff": t(4, 2)}, ValueError, "coeff of shape [B, K] = [4, 3], got [4, 2]"),
        ("coeff dtype", {"coeff": t(4, 3, dtype=F64)}, TypeError,
         "coeff of dtype float32 (in which sums over float32 basis run), got float64; "
         "convert it with .to(torch.float32)"),
        ("low coeff", CONV_LOW | low, TypeError,
         "coeff of dtype float32 (in which sums over bfloat16 basis run), got bfloat16; "
         "convert it with .to(torch.float32)"),
        ("coeff device", {"coeff": meta(4, 3)}, ValueError, "coeff on cpu (where basis is), got meta"),
        ("channels", {"input": t(4, 5, 8, 7)}, ValueError,
         "input of 6 channels (basis.shape[2] * groups = 3 * 2), got 5"),
        ("no group", {"groups": 0}, ValueError, "groups >= 1 that divides O = 10, got 0"),
        ("negative groups", {"groups": -2}, ValueError, "groups >= 1 that divides O = 10, got -2"),
        ("odd groups", {"groups": 3}, ValueError, "groups >= 1 that divides O = 10, got 3"),
        ("bias shape", {"bias": t(10)}, ValueError, "bias of shape [K, O] = [3, 10], got [10]"),
        ("bias dtype", {"bias": t(3, 10, dtype=F16)}, TypeError,
         "bias of dtype float32 (that of basis), got float16; convert one of them"),
        ("bias device", {"bias": meta(3, 10)}, ValueError, "bias on cpu (where basis is), got meta"),
        ("no stride", {"stride": [0, 1]}, ValueError, "stride of 2 numbers >= 1, got [0, 1]"),
        ("one stride", {"stride": [1]}, ValueError, "stride of 2 numbers >= 1, got [1]"),
        ("negative padding", {"padding": [1, -1]}, ValueError, "padding of 2 numbers >= 0, got [1, -1]"),
        ("three paddings", {"padding": [1, 1, 1]}, ValueError, "padding of 2 numbers >= 0, got [1, 1, 1]"),
        ("huge stride", {"stride": [1, 2**63 - 1]}, ValueError, "stride below 2**31, got [1, 9223372036854775807]"),
        ("huge dilation", {"dilation": [2**62, 1]}, ValueError, "dilation below 2**31, got [4611686018427387904, 1]"),
        ("no dilation", {"dilation": [1, 0]}, ValueError, "dilation of 2 numbers >= 1, got [1, 0]"),
        ("no kernel", {"basis": t(3, 10, 3, 0, 2)}, ValueError,
         "basis with a kernel of at least 1 in every dimension, got [0, 2]"),
        ("large kernel", {"dilation": [5, 1]}, ValueError,
         "basis with a kernel within the padded input [10, 7], got one that spans [11, 2]"),
    ]  # fmt: skip


FLY_INDEX = torch.zeros(5, 2, dtype=INT)  # B = 4, I = 6, H = 5, n = 2, O = 7, T = 3
FLY = {
    "input": t(4, 6), "index": FLY_INDEX, "gain": t(3, 5), "readout": t(7, 5),
    "task": torch.zeros(4, dtype=INT),
}  # fmt: skip


def fly_rows(lead: str) -> Rows:
    """What the ops of fly hashing have in common; ``lead`` has the dtype and device of the others."""
    like = [
        ("input dtype", {"input": t(4, 6, dtype=F64)}, TypeError,
         "input of dtype float32 (that of grad_output), got float64; convert one of them"),
        ("input device", {"input": meta(4, 6)}, ValueError, "input on cpu (where grad_output is), got meta"),
        ("grad rank", {G: t(4)}, ValueError, "grad_output of shape [B, "),
        ("grad samples", {G: t(3, 5)}, ValueError, "grad_output of shape [B, "),
    ] if lead == G else []  # fmt: skip
    return [
        *like,
        ("integers", {lead: t(4, 6, dtype=INT)}, TypeError, f"{lead} {FLOATING} int64"),
        ("complex", {lead: t(4, 6, dtype=torch.complex64)}, TypeError, f"{lead} {FLOATING} complex64"),
        ("rank 1", {"input": t(6)}, ValueError, "input of shape [B, I], got [6]"),
        ("rank 3", {"input": t(4, 2, 6)}, ValueError, "input of shape [B, I], got [4, 2, 6]"),
        ("floating index", {"index": t(5, 2)}, TypeError,
         "index of dtype int32 or int64, got float32; convert it with .long()"),
        ("int16 index", {"index": t(5, 2, dtype=torch.int16)}, TypeError,
         "index of dtype int32 or int64, got int16; convert it with .long()"),
        ("uint8 index", {"index": t(5, 2, dtype=torch.uint8)}, TypeError, "index of dtype int32 or int64, got uint8"),
        ("index device", {"index": meta(5, 2).long()}, ValueError,
         f"index on cpu (where {lead} is), got meta; move one of them"),
        ("index rank 1", {"index": FLY_INDEX[0]}, ValueError, "index of shape [H, n], got [2]"),
        ("index rank 3", {"index": FLY_INDEX[None]}, ValueError, "index of shape [H, n], got [1, 5, 2]"),
    ]  # fmt: skip


def readout_rows(lead: str) -> Rows:
    return [
        *fly_rows(lead),
        ("gain dtype", {"gain": t(3, 5, dtype=BF16)}, TypeError,
         f"gain of dtype float32 (that of {lead}), got bfloat16; convert one of them"),
        ("gain device", {"gain": meta(3, 5)}, ValueError, f"gain on cpu (where {lead} is), got meta"),
        ("gain rank", {"gain": t(5)}, ValueError, "gain of shape [T, H], got [5]"),
        ("gain units", {"gain": t(3, 6)}, ValueError, "gain of shape [T, H] = [3, 5], got [3, 6]"),
        ("gain of tasks", {"task": None}, ValueError, "gain of shape [H] = [5], got [3, 5]"),
        ("readout dtype", {"readout": t(7, 5, dtype=F64)}, TypeError,
         f"readout of dtype float32 (that of {lead}), got float64; convert one of them"),
        ("readout device", {"readout": meta(7, 5)}, ValueError, f"readout on cpu (where {lead} is), got meta"),
        ("readout rank", {"readout": t(5)}, ValueError, "readout of shape [O, H], got [5]"),
        ("readout units", {"readout": t(7, 4)}, ValueError, "readout of shape [O, H] = [7, 5], got [7, 4]"),
        ("task dtype", {"task": torch.zeros(4, dtype=torch.int32)}, TypeError,
         "task of dtype int64, got int32; convert it with .long()"),
        ("task device", {"task": meta(4).long()}, ValueError, f"task on cpu (where {lead} is), got meta"),
        ("task samples", {"task": torch.zeros(3, dtype=INT)}, ValueError, "task of shape [B] = [4], got [3]"),
        ("task rank", {"task": torch.zeros(4, 1, dtype=INT)}, ValueError, "task of shape [B] = [4], got [4, 1]"),
    ]  # fmt: skip


SIGNS = torch.ones(6, dtype=torch.int8)  # of 5 weights: of rotations of 4 and of 2


def sign_rows(name: str) -> Rows:
    return [
        ("float signs", {"signs": t(6)}, TypeError, "signs of dtype int8, got float32"),
        ("signs of int64", {"signs": t(6, dtype=INT)}, TypeError, "signs of dtype int8, got int64"),
        ("signs device", {"signs": SIGNS.to("meta")}, ValueError,
         f"signs on cpu (where {name} is), got meta; move one of them"),
        ("few signs", {"signs": SIGNS[:5]}, ValueError, "signs of shape [p + q] = [6], got [5]"),
        ("signs rank", {"signs": SIGNS[None]}, ValueError, "signs of shape [p + q] = [6], got [1, 6]"),
    ]  # fmt: skip
