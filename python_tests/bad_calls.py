# ruff: noqa: E501  (a table: one call a row)
"""Calls of the ops that must be refused, with the class and the words of the refusal.

The words are all that follows "<op>: expected ".
"""

import math
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


GOOD: dict[str, dict[str, Any]] = {
    "manifold_linear": {"input": t(4, 6), "basis": t(3, 5, 6), "coeff": t(4, 3), "bias": t(3, 5)},
    "manifold_linear_backward": {
        "grad_output": t(4, 5), "input": t(4, 6), "basis": t(3, 5, 6), "coeff": t(4, 3), "bias": t(3, 5),
        "needed": [True] * 4,
    },
    "manifold_linear_grad_input": {"grad_output": t(4, 5), "basis": t(3, 5, 6), "coeff": t(4, 3)},
    "manifold_linear_grad_basis": {"grad_output": t(4, 2, 5), "input": t(4, 2, 6), "coeff": t(4, 3)},
    "manifold_linear_grad_coeff": {"grad_output": t(4, 2, 5), "input": t(4, 2, 6), "basis": t(3, 5, 6)},
    "manifold_linear_update_": {
        "basis": t(3, 5, 6), "grad_output": t(4, 2, 5), "input": t(4, 2, 6), "coeff": t(4, 3),
    },
    "manifold_linear_local": {
        "input": t(4, 6), "basis": t(3, 5, 6), "index": t(4, dtype=INT), "coeff": t(4, 2), "bias": t(3, 5),
    },
    "manifold_linear_local_backward": {
        "grad_output": t(4, 5), "input": t(4, 6), "basis": t(3, 5, 6), "index": t(4, dtype=INT), "coeff": t(4, 2),
        "bias": t(3, 5), "needed": [True] * 4,
    },
    "manifold_conv": CONV,
    "manifold_conv_backward": {"grad_output": t(4, 10, 4, 6), **CONV, "needed": [True] * 4},
    "interpolate_weights": {"basis": t(3, 5, 6), "coeff": t(4, 3)},
    "interpolate_weights_backward": {
        "grad_output": t(4, 5, 6), "basis": t(3, 5, 6), "coeff": t(4, 3), "needed": [True] * 2,
    },
    "interpolate_weights_grad_basis": {"grad_output": t(4, 5, 6), "coeff": t(4, 3)},
    "interpolate_weights_grad_coeff": {"grad_output": t(4, 5, 6), "basis": t(3, 5, 6)},
    "manifold_metric": {"coeff": t(7, 3), "weight": t(7)},
    "manifold_step_": {
        "param": t(3, 5), "grad": t(3, 5), "momentum_buffer": t(3, 5), "metric_inverse": t(3, 3),
        "lr": 0.1, "momentum": 0.9,
    },
    "manifold_step_foreach_": {
        "params": [t(3, 5), t(2, 4)], "grads": [t(3, 5), t(2, 4)], "momentum_buffers": [t(3, 5), t(2, 4)],
        "metric_inverses": [t(3, 3), None], "lr": t(dtype=F64), "momentum": 0.9,
    },
    "fly_hash": {"input": t(4, 6), "index": FLY_INDEX},
    "fly_hash_backward": {"grad_output": t(4, 5), "input": t(4, 6), "index": FLY_INDEX},
    "fly_readout": FLY,
    "fly_readout_backward": {"grad_output": t(4, 7), **FLY, "needed": [True] * 3},
    "hadamard_rotate": {"weights": t(3, 5), "signs": SIGNS},
    "hadamard_rotate_": {"weights": [t(2, 2), t(1)], "signs": SIGNS},
}  # fmt: skip
INTERPOLATE_GRADIENTS: Rows = [
    ("rank 0", {G: t()}, ValueError, "grad_output of shape [B, ...], got []"),
    ("integers", {G: t(4, 5, 6, dtype=INT)}, TypeError, f"grad_output {FLOATING} int64"),
    ("uint8", {G: t(4, 5, 6, dtype=torch.uint8)}, TypeError, f"grad_output {FLOATING} uint8"),
    ("int32", {G: t(4, 5, 6, dtype=torch.int32)}, TypeError, f"grad_output {FLOATING} int32"),
    ("int16", {G: t(4, 5, 6, dtype=torch.int16)}, TypeError, f"grad_output {FLOATING} int16"),
    ("basis dtype", {"basis": t(3, 5, 6, dtype=F64)}, TypeError,
     "basis of dtype float32 (that of grad_output), got float64; convert one of them"),
    ("basis device", {"basis": meta(3, 5, 6)}, ValueError, "basis on cpu (where grad_output is), got meta"),
    ("basis rank 0", {"basis": t()}, ValueError, "basis of shape [K, ...], got []"),
    ("basis rank", {"basis": t(3, 5)}, ValueError, "basis of shape [K, ...] = [3, 5, 6], got [3, 5]"),
    ("basis shape", {"basis": t(3, 5, 7)}, ValueError, "basis of shape [K, ...] = [3, 5, 6], got [3, 5, 7]"),
]  # fmt: skip
BAD: dict[str, Rows] = {
    "manifold_linear": [*linear_rows(X, 6, "I"), *DENSE, *bias_rows(X)],
    "manifold_linear_backward": [
        *linear_rows(G, 5, "O", with_input=True), *DENSE, *bias_rows(G), *INPUT_OF_G,
    ],
    "manifold_linear_grad_input": [*linear_rows(G, 5, "O"), *DENSE],
    "manifold_linear_grad_basis": outer_rows(),
    "manifold_linear_update_": [
        *outer_rows(),
        ("basis dtype", {"basis": t(3, 5, 6, dtype=BF16)}, TypeError,
         "basis of dtype float32 (that of grad_output), got bfloat16; convert one of them"),
        ("basis device", {"basis": meta(3, 5, 6)}, ValueError, "basis on cpu (where grad_output is), got meta"),
        ("basis shape", {"basis": t(3, 6, 5)}, ValueError, "basis of shape [K, O, I] = [3, 5, 6], got [3, 6, 5]"),
        ("basis rank", {"basis": t(5, 6)}, ValueError, "basis of shape [K, O, I] = [3, 5, 6], got [5, 6]"),
    ],
    "manifold_linear_local": [*linear_rows(X, 6, "I", local=True), *LOCAL, *bias_rows(X)],
    "manifold_linear_local_backward": [
        *linear_rows(G, 5, "O", local=True, with_input=True), *LOCAL, *bias_rows(G), *INPUT_OF_G,
    ],
    "manifold_linear_grad_coeff": [
        ("rank 1", {G: t(5)}, ValueError, "grad_output of shape [B, ..., O], got [5]"),
        ("integers", {G: t(4, 2, 5, dtype=INT)}, TypeError, f"grad_output {FLOATING} int64"),
        ("input dtype", {X: t(4, 2, 6, dtype=BF16)}, TypeError,
         "input of dtype float32 (that of grad_output), got bfloat16; convert one of them"),
        ("input device", {X: meta(4, 2, 6)}, ValueError, "input on cpu (where grad_output is), got meta"),
        ("input tokens", {X: t(4, 3, 6)}, ValueError, "input of shape [B, ..., I] = [4, 2, 6], got [4, 3, 6]"),
        ("input width", {X: t(4, 2, 7)}, ValueError, "input of shape [B, ..., I] = [4, 2, 6], got [4, 2, 7]"),
        ("output width", {G: t(4, 2, 6)}, ValueError, "grad_output of shape [B, ..., O] = [4, ..., 5], got [4, 2, 6]"),
        ("basis rank", {"basis": t(5, 6)}, ValueError, "basis of shape [K, O, I], got [5, 6]"),
        ("basis dtype", {"basis": t(3, 5, 6, dtype=F64)}, TypeError,
         "basis of dtype float32 (that of grad_output), got float64; convert one of them"),
        ("basis device", {"basis": meta(3, 5, 6)}, ValueError, "basis on cpu (where grad_output is), got meta"),
        ("no basis point", {"basis": t(0, 5, 6)}, ValueError, "basis with at least one basis point (K >= 1), got K = 0"),
    ],
    "manifold_conv": conv_rows(),
    "manifold_conv_backward": [
        *conv_rows(grad_output=t(4, 10, 4, 6, dtype=BF16)),
        ("grad_output shape", {G: t(4, 10, 4, 7)}, ValueError,
         "grad_output of shape [B, O, H, W] = [4, 10, 4, 6], got [4, 10, 4, 7]"),
        ("grad_output dtype", {G: t(4, 10, 4, 6, dtype=F64)}, TypeError,
         "grad_output of dtype float32 (that of input), got float64; convert one of them"),
        ("grad_output device", {G: meta(4, 10, 4, 6)}, ValueError, "grad_output on cpu (where input is), got meta"),
    ],
    "interpolate_weights": [
        ("rank 0", {"basis": t()}, ValueError, "basis of shape [K, ...], got []"),
        ("integers", {"basis": t(3, 5, 6, dtype=INT)}, TypeError, f"basis {FLOATING} int64"),
        ("bool", {"basis": t(3, 5, 6, dtype=torch.bool)}, TypeError, f"basis {FLOATING} bool"),
        ("no basis point", {"basis": t(0, 5, 6), "coeff": t(4, 0)}, ValueError,
         "basis with at least one basis point (K >= 1), got K = 0"),
        ("coeff dtype", {"coeff": t(4, 3, dtype=F64)}, TypeError,
         "coeff of dtype float32 (in which sums over float32 basis run), got float64; convert it with"),
        ("wide coeff", {"basis": t(3, 5, dtype=F64)}, TypeError,
         "coeff of dtype float64 (in which sums over float64 basis run), got float32; convert it with"),
        ("coeff device", {"coeff": meta(4, 3)}, ValueError, "coeff on cpu (where basis is), got meta"),
        ("coeff rank 1", {"coeff": t(3)}, ValueError, "coeff of shape [B, K], got [3]"),
        ("coeff rank 3", {"coeff": t(4, 3, 1)}, ValueError, "coeff of shape [B, K], got [4, 3, 1]"),
        ("coeff points", {"coeff": t(4, 2)}, ValueError, "coeff of shape [B, K] = [4, 3], got [4, 2]"),
    ],
    "interpolate_weights_grad_basis": [
        ("rank 0", {G: t()}, ValueError, "grad_output of shape [B, ...], got []"),
        ("integers", {G: t(4, 5, 6, dtype=INT)}, TypeError, f"grad_output {FLOATING} int64"),
        ("int8", {G: t(4, 5, 6, dtype=torch.int8)}, TypeError, f"grad_output {FLOATING} int8"),
        ("complex", {G: t(4, 5, dtype=torch.complex128)}, TypeError, f"grad_output {FLOATING} complex128"),
        ("coeff dtype", {"coeff": t(4, 3, dtype=F64)}, TypeError,
         "coeff of dtype float32 (in which sums over float32 grad_output run), got float64; convert it with"),
        ("coeff integers", {"coeff": t(4, 3, dtype=INT)}, TypeError,
         "coeff of dtype float32 (in which sums over float32 grad_output run), got int64; convert it with"),
        ("coeff device", {"coeff": meta(4, 3)}, ValueError, "coeff on cpu (where grad_output is), got meta"),
        ("coeff rank 1", {"coeff": t(4)}, ValueError, "coeff of shape [B, K], got [4]"),
        ("coeff rank 3", {"coeff": t(4, 3, 1)}, ValueError, "coeff of shape [B, K], got [4, 3, 1]"),
        ("coeff samples", {"coeff": t(5, 3)}, ValueError, "coeff of shape [B, K] = [4, 3], got [5, 3]"),
    ],
    "interpolate_weights_backward": [
        *INTERPOLATE_GRADIENTS,
        ("coeff dtype", {"coeff": t(4, 3, dtype=F64)}, TypeError,
         "coeff of dtype float32 (in which sums over float32 grad_output run), got float64; convert it with"),
        ("coeff device", {"coeff": meta(4, 3)}, ValueError, "coeff on cpu (where grad_output is), got meta"),
        ("coeff rank", {"coeff": t(3)}, ValueError, "coeff of shape [B, K] = [4, 3], got [3]"),
        ("coeff points", {"coeff": t(4, 2)}, ValueError, "coeff of shape [B, K] = [4, 3], got [4, 2]"),
    ],
    "interpolate_weights_grad_coeff": INTERPOLATE_GRADIENTS,
    "manifold_metric": [
        ("rank 1", {"coeff": t(3)}, ValueError, "coeff of shape [N, K], got [3]"),
        ("rank 3", {"coeff": t(7, 3, 1)}, ValueError, "coeff of shape [N, K], got [7, 3, 1]"),
        ("bfloat16", {"coeff": t(7, 3, dtype=BF16)}, TypeError,
         "coeff of dtype float64 or float32, got bfloat16; convert it with .float()"),
        ("float16", {"coeff": t(7, 3, dtype=F16)}, TypeError, "coeff of dtype float64 or float32, got float16"),
        ("integers", {"coeff": t(7, 3, dtype=INT)}, TypeError, "coeff of dtype float64 or float32, got int64"),
        ("weight dtype", {"weight": t(7, dtype=F64)}, TypeError,
         "weight of dtype float32 (that of coeff), got float64; convert one of them"),
        ("weight device", {"weight": meta(7)}, ValueError, "weight on cpu (where coeff is), got meta"),
        ("weight rank", {"weight": t(7, 1)}, ValueError, "weight of shape [N] = [7], got [7, 1]"),
        ("weight samples", {"weight": t(6)}, ValueError, "weight of shape [N] = [7], got [6]"),
        ("no condition", {"coeff": t(0, 3), "weight": None}, ValueError,
         "coeff of at least one condition (N >= 1), got N = 0"),
    ],
    "manifold_step_": [
        ("rank 0", {"param": t()}, ValueError, "param of shape [K, ...], got []"),
        ("integers", {"param": t(3, 5, dtype=INT)}, TypeError, f"param {FLOATING} int64"),
        ("grad dtype", {"grad": t(3, 5, dtype=F64)}, TypeError,
         "grad of dtype float32 (that of param), got float64; convert one of them"),
        ("grad device", {"grad": meta(3, 5)}, ValueError, "grad on cpu (where param is), got meta"),
        ("grad shape", {"grad": t(3, 1)}, ValueError, "grad of shape [K, ...] = [3, 5], got [3, 1]"),
        ("buffer shape", {"momentum_buffer": t(3, 4)}, ValueError,
         "momentum_buffer of shape [K, ...] = [3, 5], got [3, 4]"),
        ("buffer dtype", {"momentum_buffer": t(3, 5, dtype=F64)}, TypeError,
         "momentum_buffer of dtype float32 (that of param), got float64"),
        ("buffer device", {"momentum_buffer": meta(3, 5)}, ValueError, "momentum_buffer on cpu (where param is), got meta"),
        ("no buffer", {"momentum_buffer": None}, ValueError,
         "a momentum_buffer for momentum != 0, got None; pass a tensor like param"),
        ("metric shape", {"metric_inverse": t(2, 2)}, ValueError, "metric_inverse of shape [K, K] = [3, 3], got [2, 2]"),
        ("metric dtype", {"metric_inverse": t(3, 3, dtype=F64)}, TypeError,
         "metric_inverse of dtype float32 (in which sums over float32 param run), got float64"),
        ("metric device", {"metric_inverse": meta(3, 3)}, ValueError, "metric_inverse on cpu (where param is), got meta"),
        ("lr NaN", {"lr": math.nan}, ValueError, "lr to be finite, got nan"),
        ("lr infinite", {"lr": math.inf}, ValueError, "lr to be finite, got inf"),
        ("momentum infinite", {"momentum": -math.inf}, ValueError, "momentum to be finite, got -inf"),
        ("dampening NaN", {"dampening": math.nan}, ValueError, "dampening to be finite, got nan"),
        ("decay NaN", {"weight_decay": math.nan}, ValueError, "weight_decay to be finite, got nan"),
    ],
    "manifold_step_foreach_": [
        ("no grads", {"grads": []}, ValueError, "as many grads as params = 2, got 0"),
        ("one buffer", {"momentum_buffers": [t(3, 5)]}, ValueError, "as many momentum_buffers as params = 2, got 1"),
        ("no buffer", {"momentum_buffers": []}, ValueError,
         "a momentum_buffer for momentum != 0, got None; pass a tensor like param"),
        ("three inverses", {"metric_inverses": [None] * 3}, ValueError, "as many metric_inverses as params = 2, got 3"),
        ("lr dtype", {"lr": t()}, TypeError, "lr of dtype float64, got float32; convert it with .double()"),
        ("lr shape", {"lr": t(1, dtype=F64)}, ValueError, "lr of shape [] = [], got [1]"),
        ("momentum infinite", {"momentum": math.inf}, ValueError, "momentum to be finite, got inf"),
        ("integers", {"params": [t(3, 5, dtype=INT), t(2, 4)]}, TypeError, f"params[0] {FLOATING} int64"),
        ("rank 0", {"params": [t(3, 5), t()]}, ValueError, "params[1] of shape [K, ...], got []"),
        ("two dtypes", {"params": [t(3, 5), t(2, 4, dtype=F64)]}, TypeError,
         "params[1] of dtype float32 (that of params[0]), got float64; convert one of them"),
        ("param device", {"params": [t(3, 5), meta(2, 4)]}, ValueError,
         "params[1] on cpu (where params[0] is), got meta; move one of them"),
        ("grad shape", {"grads": [t(3, 5), t(2, 5)]}, ValueError, "grads[1] of shape [K, ...] = [2, 4], got [2, 5]"),
        ("buffer dtype", {"momentum_buffers": [t(3, 5, dtype=F64), t(2, 4)]}, TypeError,
         "momentum_buffers[0] of dtype float32 (that of params[0]), got float64"),
        ("metric shape", {"metric_inverses": [None, t(3, 3)]}, ValueError,
         "metric_inverses[1] of shape [K, K] = [2, 2], got [3, 3]"),
        ("metric dtype", {"metric_inverses": [t(3, 3, dtype=F64), None]}, TypeError,
         "metric_inverses[0] of dtype float32 (in which sums over float32 params[0] run), got float64"),
        ("decay NaN", {"weight_decay": math.nan}, ValueError, "weight_decay to be finite, got nan"),
    ],
    "fly_hash": fly_rows(X),
    "fly_hash_backward": fly_rows(G),
    "fly_readout": readout_rows(X),
    "fly_readout_backward": readout_rows(G),
    "hadamard_rotate": [
        ("rank 0", {"weights": t()}, ValueError, "weights of shape [..., n], got []"),
        ("no weight", {"weights": t(3, 0)}, ValueError, "weights of shape [..., n] with n >= 1, got [3, 0]"),
        ("integers", {"weights": t(3, 5, dtype=INT)}, TypeError, "weights of dtype float64 or float32, got int64"),
        ("bfloat16", {"weights": t(3, 5, dtype=BF16)}, TypeError,
         "weights of dtype float64 or float32, got bfloat16; convert it with .float()"),
        ("float16", {"weights": t(3, 5, dtype=F16)}, TypeError, "weights of dtype float64 or float32, got float16"),
        ("more weights", {"weights": t(3, 7)}, ValueError, "signs of shape [p + q] = [8], got [6]"),
        ("a power of two", {"weights": t(3, 4)}, ValueError, "signs of shape [p + q] = [4], got [6]"),
        *sign_rows("weights"),
    ],
    "hadamard_rotate_": [
        ("nothing", {"weights": []}, ValueError, "weights with at least one element, got none"),
        ("empty", {"weights": [t(0), t(2, 0)]}, ValueError, "weights with at least one element, got none"),
        ("integers", {"weights": [t(4, dtype=INT)]}, TypeError, "weights[0] of dtype float64 or float32, got int64"),
        ("bfloat16", {"weights": [t(4, dtype=BF16), t(2)]}, TypeError,
         "weights[0] of dtype float64 or float32, got bfloat16; convert it with .float()"),
        ("two dtypes", {"weights": [t(4), t(2, dtype=F64)]}, TypeError,
         "weights[1] of dtype float32 (that of weights[0]), got float64; convert one of them"),
        ("two devices", {"weights": [t(4), meta(2)]}, ValueError,
         "weights[1] on cpu (where weights[0] is), got meta; move one of them"),
        ("one weight more", {"weights": [t(4), t(3)]}, ValueError, "signs of shape [p + q] = [8], got [6]"),
        *sign_rows("weights[0]"),
    ],
}  # fmt: skip
