"""The ops of manifold_linear: how to draw their operands, and what they should yield.

One form stands behind all, F(c, P, x, g) = sum c[b,l] g[b,t,o] P[k,o,i] x[b,t,i] with
k = (index[b] + l) mod K, or k = l without an index. Each formula is written in the order in which a
plan of the kernels sums: ``expand`` (the CUDA kernels' order, too), ``expand_gemm``, ``fold`` or
``stream``. It matters to where infinities become NaN, not to the bound: magnitudes are evaluated in
one order, which bounds every plan's (see bounds.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from bounds import Array, Expected, Pass, expect
from entry import Call, Op, einsum
from sampling import Draw, wide
from torch import Tensor

from neuromod_ext import _C

PLANS = ("expand", "fold", "stream", "fold_gemm", "expand_gemm")
BACKWARD = "gxPcb"  # roles in the order of the signature; an index follows the basis


def tokens(t: Array) -> Array:
    return t.reshape(t.shape[0], -1 if t.size else int(np.prod(t.shape[1:-1])), t.shape[-1])


# Operands


def linear_draw(roles: str) -> Callable[[Draw, int], Call]:
    def draw(d: Draw, most: int) -> Call:
        B, T, O, I = d.sizes(4, most // 4)
        K = d.random.randint(1, 16 if most >= B * T * O * I * 16 else 4)
        middle = d.pick((), (), (T,), (T, 1), (1, T)) if most >= B * T * O * I * K else ()
        return linear_call(d, roles, B, middle, K, O, I, bias=d.pick(True, False))

    return draw


def linear_large(roles: str) -> Callable[[Draw], Call]:
    def draw(d: Draw) -> Call:
        call = linear_call(d, roles, 75, (4,), 3, 150, 200, bias=True)
        if call.others:
            call.others["needed"] = [True] * 4
        return call

    return draw


def linear_call(d: Draw, roles: str, B, middle, K, O, I, bias, L=None) -> Call:
    if "i" in roles and L is None:
        L = d.random.randint(1, K)
    make = {
        "x": lambda: d.tensor(B, *middle, I),
        "g": lambda: d.tensor(B, *middle, O),
        "P": lambda: d.tensor(K, O, I, in_place=roles[0] == "P"),
        "i": lambda: d.index(B, modulus=K),
        "c": lambda: d.coeff(B, L or K),
        "b": lambda: d.tensor(K, O) if bias else None,
    }
    call = Call([make[role]() for role in roles])
    if is_backward(roles):
        call.others["needed"] = [d.random.random() < 0.8 for _ in range(4)]
    return call


def is_backward(roles: str) -> bool:
    return set(BACKWARD) <= set(roles)


def plan_of(roles: str) -> Callable[[Call], str]:
    """The plan the CPU takes, whatever bias and precisions say: by cost, or by NEUROMOD_PLAN."""

    def plan(call: Call) -> str:
        t = dict(zip(roles, call.tensors, strict=False))
        lead = t["g"] if "g" in t else t["x"]
        weight = t["P"].shape if "P" in t else (t["c"].shape[1], t["g"].shape[-1], t["x"].shape[-1])
        plans = _C.explain(
            dtype=str(lead.dtype).removeprefix("torch."),
            batch=lead.shape[0],
            tokens=int(np.prod(lead.shape[1:-1])),
            num_basis=weight[0],
            num_local=t["c"].shape[1] if "i" in t else 0,
            out_features=weight[1],
            in_features=weight[2],
        )
        if "g" not in t:
            return plans["forward"][0][0]
        return plans["update" if roles.startswith("P") else "backward"][0][0]

    return plan


# Formulas


@dataclass(frozen=True)
class Form:
    """Wide operands of one call; those that a formula does not need may be missing.

    With an index, ``P`` and ``b`` lead with the sample, and hold the L basis points that act there.
    """

    at: Pass
    plan: str
    with_coeff: bool  # the gradient of c is asked for, too
    x: Array | None
    g: Array | None
    P: Array | None
    c: Array | None
    b: Array | None
    points: Array | None  # [B, L]
    num_basis: int

    def _einsum(self, equation: str, *operands: Array) -> Array:
        """Where W and V stand for the subscripts of P and b."""
        local = "b" if self.points is not None else ""
        return einsum(equation.replace("W", local + "koi").replace("V", local + "ko"), *operands)

    def _folds(self) -> bool:
        """Magnitudes too: of a blend that is stored, what is stored may be flushed."""
        return self.plan.startswith("fold") or self.at.minus == 1

    def output(self) -> Array:
        if self._folds():
            weight = self._einsum("bk,W->boi", self.c, self.P) + self.at.tiny
            y = einsum("bti,boi->bto", self.x, weight)
            return y if self.b is None else y + self._einsum("bk,V->bo", self.c, self.b)[:, None]
        if self.plan == "expand_gemm" and self.b is not None:
            y = einsum("btko,bk->bto", replace(self, b=None)._products(), self.c)
            return y + self._einsum("bk,V->bo", self.c, self.b)[:, None]
        return einsum("btko,bk->bto", self._products(), self.c)

    def _products(self) -> Array:
        """Each basis point's output."""
        z = self._einsum("bti,W->btko", self.x, self.P)
        if self.b is None:
            return z
        return z + (self.b if self.points is None else self.b[:, None])

    def grad_input(self) -> Array:
        if self._folds():
            weight = self._einsum("bk,W->boi", self.c, self.P) + self.at.tiny
            return einsum("bto,boi->bti", self.g, weight)
        scaled = self.plan == "expand_gemm" and not self.with_coeff and self.points is None
        if self.plan == "stream" or scaled:
            return self._einsum("btko,W->bti", einsum("bk,bto->btko", self.c, self.g), self.P)
        z = self._einsum("bto,W->btki", self.g, self.P)
        return einsum("btki,bk->bti", z, self.c)

    def grad_basis(self) -> Array:
        if self.plan.startswith("fold") and self.at.minus != 1:
            outer = einsum("bto,bti->boi", self.g, self.x)
            terms = einsum("bk,boi->bkoi", self.c, outer)
        else:
            cg = einsum("bk,bto->btko", self.c, self.g) + self.at.tiny  # stored in the dtype of g
            if self.points is None:
                return einsum("btko,bti->koi", cg, self.x)
            terms = einsum("btko,bti->bkoi", cg, self.x)
        return self._summed(terms)

    def grad_bias(self) -> Array:
        return self._summed(einsum("bk,bto->bko", self.c, self.g))

    def _summed(self, terms: Array) -> Array:
        """[B, L, ...] to [K, ...]: each sample's terms go to the basis points that act there."""
        if self.points is None:
            return terms.sum(0)
        total = np.zeros((self.num_basis, *terms.shape[2:]), terms.dtype)
        np.add.at(total, self.points, terms)
        return total

    def grad_coeff(self) -> Array:
        if self.plan == "stream":
            return einsum("bto,btko->bk", self.g, self._products())
        if self.plan.startswith("fold"):
            outer = einsum("bto,bti->boi", self.g, self.x)
            total = self._einsum("boi,W->bk", outer, self.P)
        else:
            z = self._einsum("bto,W->btki", self.g, self.P)
            total = einsum("btki,bti->bk", z, self.x)
        if self.b is None:
            return total
        return total + self._einsum("bto,V->bk", self.g, self.b)


def oracle(roles: str, results: str) -> Callable[..., list[Expected]]:
    """What an op of ``roles`` yields: y, gradients (x, P, c, b) or the changed P (+)."""

    def run(*tensors: Tensor | None, needed=(True,) * 4, plan: str = "expand") -> list[Expected]:
        named = {r: t for r, t in zip(roles, tensors, strict=False) if t is not None}
        wanted = [r if need else "" for r, need in zip(results, needed, strict=False)]
        return [one_result(named, result, plan, "c" in wanted) for result in wanted]

    return run


def one_result(named: dict[str, Tensor], result: str, plan: str, with_coeff: bool) -> Expected:
    floats = {role: t for role, t in named.items() if role != "i"}
    lead = named["g"] if "g" in named else named["x"]
    if result == "":  # a gradient that is not needed
        nothing = np.zeros(0)
        return Expected(nothing, nothing, nothing, 0, lead.dtype, lead.dtype)
    B, T = lead.shape[0], int(np.prod(lead.shape[1:-1]))
    K = named["P" if "P" in named else "c"].shape[0 if "P" in named else 1]
    points = None
    if "i" in named:
        local = np.arange(named["c"].shape[1])
        points = (named["i"].cpu().numpy()[:, None] % K + local) % K

    def formula(at: Pass, *values: Array) -> Array:
        t = dict(zip(floats, values, strict=True))
        given = {role: t.get(role) for role in "xgPcb"}
        for role in "xg":
            if role in t:
                given[role] = tokens(t[role])
        for role in "Pb":
            if points is not None and role in t:
                given[role] = t[role][points]
        form = Form(at, plan, with_coeff, **given, points=points, num_basis=K)
        if result == "y":
            return form.output().reshape(*lead.shape[:-1], t["P"].shape[1])
        if result == "x":
            return form.grad_input().reshape(*lead.shape[:-1], t["P"].shape[2])
        if result == "+":
            return t["P"] + form.grad_basis()
        return {"P": form.grad_basis, "c": form.grad_coeff, "b": form.grad_bias}[result]()

    O = lead.shape[-1] if "g" in named else named["P"].shape[1]
    I = named["P"].shape[2] if "P" in named else named["x"].shape[-1]
    terms = {
        "y": I + K,
        "x": O + K + 16 + K * (O // 16),  # stream: sums of 16 blocks of outputs
        "P": B * T + 1,
        "+": B * T + 2,
        "b": B * T + 1,
        "c": O + I + T * (17 + I // 64),  # and of 16 blocks, or tiles of 64 inputs, for each token
    }
    dtype = wide(lead.dtype) if result == "c" else lead.dtype
    return expect(formula, list(floats.values()), terms[result], dtype, lead.dtype)


def linear_op(suffix: str, roles: str, results: str, **options) -> Op:
    return Op(
        f"manifold_linear{suffix}",
        linear_draw(roles),
        linear_large(roles),
        oracle(roles, results),
        plan=plan_of(roles),
        **options,
    )


LINEAR = (
    linear_op("", "xPcb", "y"),
    linear_op("_backward", "gxPcb", "xPcb", differentiable=False),
    linear_op("_grad_input", "gPc", "x"),
    linear_op("_grad_basis", "gxc", "P"),
    linear_op("_grad_coeff", "gxP", "c"),
    linear_op("_update_", "Pgxc", "+", mutates=(0,), differentiable=False),
    linear_op("_local", "xPicb", "y"),
    linear_op("_local_backward", "gxPicb", "xPcb", differentiable=False),
)
