"""The peers of the linear ops: what a good PyTorch user writes without the library.

x [B, I] or [B, T, I], basis points P [K, O, I], coefficients c [B, K] of each sample or [K] of all.
In half precision they mix in the operands' dtype, as users do; it is the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from benchmarks.speed.problem import Layout, Variant
from neuromod_ext._hadamard_checks import rotations
from neuromod_ext.nn.switch import hadamard_transform

Peer = Callable[..., Tensor]


def wide(num_basis: int) -> Layout:
    """[O, K I, ...] in place of [K, O, I, ...], which a product with c ⊗ x reads as it lies."""
    return Layout(
        lambda basis: basis.transpose(0, 1).flatten(1, 2).contiguous(),
        lambda basis: basis.unflatten(1, (num_basis, -1)).transpose(0, 1),
    )


def _per_row(coeff: Tensor, input: Tensor) -> Tensor:
    """Coefficients in the input's dtype, with as many dimensions: [B, K] or [B, 1, K]."""
    coeff = coeff.to(input.dtype)
    return coeff if input.dim() == 2 else coeff.unsqueeze(1)


# One condition a sample


def _weights(basis: Tensor, coeff: Tensor) -> Tensor:
    return torch.einsum("bk,koi->boi", coeff.to(basis.dtype), basis)


def blended(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """A weight for each sample, and a batched product."""
    weight = _weights(basis, coeff)
    if input.dim() == 3:
        return torch.bmm(input, weight.mT)
    return torch.bmm(weight, input.unsqueeze(-1)).squeeze(-1)


@cache
def _layer(outputs: int, inputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta")


def vmap_layer(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """``nn.Linear`` under ``vmap``, with a weight for each sample."""
    layer = _layer(*basis.shape[1:])
    call = vmap(lambda weight, x: functional_call(layer, {"weight": weight}, (x,)))
    return call(_weights(basis, coeff), input)


def einsum(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """The formula as it stands, contracted in the cheaper order."""
    if input.dim() == 3:
        return torch.einsum("bk,koi,bti->bto", coeff.to(input.dtype), basis, input)
    return torch.einsum("bi,koi,bk->bo", input, basis, coeff.to(input.dtype))


def _stacked(input: Tensor, basis: Tensor) -> Tensor:
    """All basis points' outputs, [B, ..., K, O], by one linear layer."""
    return F.linear(input, basis.flatten(0, 1)).unflatten(-1, basis.shape[:2])


def stacked_einsum(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """One linear layer of K O outputs, mixed by einsum."""
    return torch.einsum("b...ko,bk->b...o", _stacked(input, basis), coeff.to(input.dtype))


def stacked_sum(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """One linear layer of K O outputs, mixed by a product and a sum."""
    return (_stacked(input, basis) * _per_row(coeff, input).unsqueeze(-1)).sum(-2)


def separate(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """K linear layers, scaled and summed."""
    scale = _per_row(coeff, input)
    return sum(scale[..., k, None] * F.linear(input, P) for k, P in enumerate(basis))


def _scaled(input: Tensor, coeff: Tensor) -> Tensor:
    """The input scaled by each coefficient, c ⊗ x, [B, ..., K I]."""
    return (_per_row(coeff, input).unsqueeze(-1) * input.unsqueeze(-2)).flatten(-2)


def scaled(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """One product of c ⊗ x with the basis, which it must copy into [K I, O]."""
    return _scaled(input, coeff) @ basis.mT.flatten(0, 1)


def scaled_wide(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """One product of c ⊗ x with a basis stored as [O, K I]."""
    return F.linear(_scaled(input, coeff), basis)


def linear_peers(samples: int, basis: Tensor) -> list[Variant]:
    """The peers for one condition a sample."""
    weights = samples * basis[0].numel() * basis.element_size()
    return [
        Variant("blended + bmm", blended, workspace=weights),
        Variant("vmap(nn.Linear)", vmap_layer, workspace=weights),
        Variant("einsum", einsum, workspace=weights),
        Variant("stacked + einsum", stacked_einsum),
        Variant("stacked + sum", stacked_sum),
        Variant("separate", separate),
        Variant("scaled", scaled),
        Variant("scaled, own layout", scaled_wide, layouts={"basis": wide(len(basis))}),
    ]


# One condition for all


def folded_einsum(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """One weight, by einsum, in one linear layer."""
    return F.linear(input, torch.einsum("k,koi->oi", coeff.to(basis.dtype), basis))


def folded_tensordot(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """One weight, by tensordot, in one linear layer."""
    return F.linear(input, torch.tensordot(coeff.to(basis.dtype), basis, 1))


def folded_sum(input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """One weight, by a product and a sum, in one linear layer."""
    return F.linear(input, (coeff.to(basis.dtype).view(-1, 1, 1) * basis).sum(0))


def _for_all(peer: Peer, input: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    return peer(input, basis, coeff.expand(len(input), -1))


def one_condition_peers(basis: Tensor) -> list[Variant]:
    """The peers for one condition for all."""
    own = {"basis": wide(len(basis))}
    return [
        Variant("folded, einsum", folded_einsum),
        Variant("folded, tensordot", folded_tensordot),
        Variant("folded, sum", folded_sum),
        Variant("stacked + einsum", partial(_for_all, stacked_einsum)),
        Variant("stacked + sum", partial(_for_all, stacked_sum)),
        Variant("separate", partial(_for_all, separate)),
        Variant("scaled, own layout", partial(_for_all, scaled_wide), layouts=own),
    ]


# Few non-zero coefficients, [B, L]: those of the basis points index, index + 1, ... modulo K


def positions(index: Tensor, coeff: Tensor, num_basis: int) -> Tensor:
    """The basis points of the non-zero coefficients, [B, L]."""
    return (index.unsqueeze(1) + torch.arange(coeff.shape[1], device=index.device)) % num_basis


def dense_coeff(index: Tensor, coeff: Tensor, num_basis: int) -> Tensor:
    """All K coefficients, [B, K]."""
    zeros = coeff.new_zeros(len(coeff), num_basis)
    return zeros.scatter(1, positions(index, coeff, num_basis), coeff)


def _with_zeros(peer: Peer, input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor) -> Tensor:
    return peer(input, basis, dense_coeff(index, coeff, len(basis)))


def gathered(input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor) -> Tensor:
    """A weight for each sample, of the basis points gathered, and a batched product."""
    pieces = basis[positions(index, coeff, len(basis))]
    weight = torch.einsum("bl,bloi->boi", coeff.to(basis.dtype), pieces)
    return torch.bmm(weight, input.unsqueeze(-1)).squeeze(-1)


def _by_segment(peer: Peer, input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor) -> Tensor:
    """Samples sorted by segment; each segment is a dense problem of L basis points."""
    K, L = len(basis), coeff.shape[1]
    order = index.argsort()
    counts = torch.bincount(index, minlength=K).tolist()
    parts = []
    groups = zip(input[order].split(counts), coeff[order].split(counts), strict=True)
    for k, (x, c) in enumerate(groups):
        if len(x):
            P = basis[k : k + L]
            if k + L > K:
                P = torch.cat((P, basis[: k + L - K]))
            parts.append(peer(x, P, c))
    return torch.cat(parts)[order.argsort()]


def _entries(
    input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all B L entries sorted by basis point: c x, the sample, and entries of each point."""
    at = positions(index, coeff, len(basis)).flatten()
    order = at.argsort()
    sample = order // coeff.shape[1]
    rows = coeff.flatten()[order].to(input.dtype).unsqueeze(1) * input[sample]
    return rows, sample, torch.bincount(at, minlength=len(basis))


def by_point(input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor) -> Tensor:
    """Entries sorted by basis point, as a mixture of experts does: K products, added up."""
    rows, sample, counts = _entries(input, basis, index, coeff)
    parts = zip(rows.split(counts.tolist()), basis, strict=True)
    out = torch.cat([F.linear(x, P) for x, P in parts])
    return out.new_zeros(len(input), basis.shape[1]).index_add(0, sample, out)


def by_point_grouped(input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor) -> Tensor:
    """Entries sorted by basis point, with torch's grouped product."""
    rows, sample, counts = _entries(input, basis, index, coeff)
    out = F.grouped_mm(rows, basis.mT, offs=counts.cumsum(0).int())
    return out.new_zeros(len(input), basis.shape[1]).index_add(0, sample, out)


def local_peers(samples: int, local: int, basis: Tensor) -> list[Variant]:
    """The peers for few non-zero coefficients."""
    weights = samples * basis[0].numel() * basis.element_size()
    return [
        Variant("by segment, separate", partial(_by_segment, separate)),
        Variant("by segment, stacked + sum", partial(_by_segment, stacked_sum)),
        Variant("by basis point", by_point),
        Variant("by basis point, grouped_mm", by_point_grouped),
        Variant("gathered + bmm", gathered, workspace=(local + 1) * weights),
        Variant("dense, stacked + einsum", partial(_with_zeros, stacked_einsum)),
        Variant("dense, stacked + sum", partial(_with_zeros, stacked_sum)),
        Variant("dense, scaled", partial(_with_zeros, scaled)),
        Variant("dense, blended + bmm", partial(_with_zeros, blended), workspace=weights),
    ]


# Weights mapped in place, those of all layers as one vector or layer by layer


def _put_back(flat: Tensor, weights: Sequence[Tensor]) -> tuple[()]:
    for w, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.copy_(part.view(w.shape))
    return ()


def rotate_by_factors(signs: Tensor, **weights: Tensor) -> tuple[()]:
    """Hadamard's matrix as products with matrices of 64 x 64 and less."""
    flat = torch.cat([w.flatten() for w in weights.values()])
    return _put_back(_rotated(flat, signs, hadamard_transform), list(weights.values()))


def rotate_by_butterflies(signs: Tensor, **weights: Tensor) -> tuple[()]:
    """One level after the other."""
    flat = torch.cat([w.flatten() for w in weights.values()])
    return _put_back(_rotated(flat, signs, _butterflies), list(weights.values()))


def _rotated(flat: Tensor, signs: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    for low, high in rotations(len(flat)):
        part, signs = signs[: high - low], signs[high - low :]
        factor = part.to(flat.dtype).mul_((high - low) ** -0.5)
        flat[low:high] = transform(flat[low:high] * factor)
    return flat


def _butterflies(x: Tensor) -> Tensor:
    h, n = 1, len(x)
    while h < n:
        a, b = x.view(-1, 2, h).unbind(1)
        x = torch.stack((a + b, a - b), 1)
        h *= 2
    return x.view(n)


def map_by_einsum(factors: Sequence[Sequence[Tensor]], **weights: Tensor) -> tuple[()]:
    """(A₁ ⊗ A₂) W (B₁ ⊗ B₂)ᵀ by one einsum a layer."""
    for fs, w in zip(factors, weights.values(), strict=True):
        x = w.view([len(f) for f in fs])
        w.copy_(torch.einsum("ae,bf,cg,dh,efgh->abcd", *fs, x).reshape(w.shape))
    return ()


def map_by_full_factors(factors: Sequence[tuple[Tensor, Tensor]], **weights: Tensor) -> tuple[()]:
    """A W Bᵀ, with A and B as large as the layer."""
    for (a, b), w in zip(factors, weights.values(), strict=True):
        w.copy_(a @ w @ b.mT)
    return ()


# Linear layers whose samples are in one of two states, with a weight for each


def _through(input: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for w in weights:
        input = F.linear(input, w)
    return input


def two_passes(
    input: Tensor, state: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
) -> Tensor:
    """All samples in both states; of each, one result is kept."""
    picked = state.bool().unsqueeze(1)
    return torch.where(picked, _through(input, second), _through(input, first))


def sorted_passes(
    input: Tensor, state: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
) -> Tensor:
    """The samples of each state through its network, and back to their places."""
    order = state.argsort()
    ones = int(state.sum())
    zero, one = input[order].split((len(state) - ones, ones))
    return torch.cat((_through(zero, first), _through(one, second)))[order.argsort()]


def weight_of_each(
    input: Tensor, state: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
) -> Tensor:
    """A weight for each sample, and batched products."""
    rows = input.unsqueeze(1)
    for a, b in zip(first, second, strict=True):
        rows = torch.bmm(rows, torch.stack((a, b))[state].mT)
    return rows.squeeze(1)
