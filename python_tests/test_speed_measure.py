"""The speed benchmark's judge, and whether its peers compute what we do."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed import limits, measure, peers, runner
from benchmarks.speed.__main__ import main
from benchmarks.speed.correctness import SLACK, expect
from benchmarks.speed.problem import BACKWARD, FORWARD, Group, Problem, Unavailable, Variant, public
from neuromod_ext import functional

CPU = torch.device("cpu")


def stub_manifold_linear_local(
    input: Tensor, basis: Tensor, index: Tensor, coeff: Tensor, bias: None = None
) -> Tensor:
    return functional.manifold_linear(input, basis, peers.dense_coeff(index, coeff, len(basis)))


def stub_natural_step_(
    basis: Tensor,
    input: Tensor,
    grad_output: Tensor,
    coeff: Tensor,
    metric_inverse: Tensor,
    lr: float,
) -> Tensor:
    gradient = functional.natural_gradient(input, grad_output, coeff, metric_inverse)
    return basis.sub_(gradient, alpha=lr)


@pytest.fixture
def every_function(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those the library lacks, in PyTorch."""
    for stub in (stub_manifold_linear_local, stub_natural_step_):
        name = stub.__name__.removeprefix("stub_")
        if not hasattr(functional, name):
            monkeypatch.setattr(functional, name, stub, raising=False)
    yield


def quick_groups(dtype: torch.dtype = torch.float32) -> Iterator[Group]:
    for bench in runner.BENCHES.values():
        yield from bench(dtype, True)


@pytest.mark.parametrize("name", runner.BENCHES)
@pytest.mark.usefixtures("every_function")
def test_variants_agree_with_float64(name: str) -> None:
    for group in runner.BENCHES[name](torch.float32, True):
        problem = group.build(CPU)
        roles = [variant.role for variant in problem.variants]
        assert roles.count("ours") == 1 and roles.count("peer") >= 2
        for direction in group.goals:
            with torch.set_grad_enabled(direction == BACKWARD):
                for variant in problem.variants:
                    if variant.role != "plain":
                        prepared = measure.Prepared(variant, problem, direction)
                        errors = prepared.errors(prepared.results())
                        gradients = problem.gradients if direction == BACKWARD else ()
                        assert set(errors) == set(problem.updated or ("output", *gradients))
                        assert max(errors.values()) <= 1, f"{group.label} {variant.name}: {errors}"


@pytest.mark.usefixtures("every_function")
def test_operands_stay_as_they_were() -> None:
    for group in quick_groups():
        problem = group.build(CPU)
        before = {name: t.clone() for name, t in problem.operands.items()}
        for direction in group.goals:
            measure.measure(problem, direction, measure.Options(1e-3, compile=False))
        for name, t in problem.operands.items():
            assert torch.equal(t, before[name]), f"{group.bench} {name}"


def small_problem(ours: Callable[..., Tensor], **peers: Callable[..., Tensor]) -> Problem:
    """The product of two matrices."""
    generator = torch.Generator().manual_seed(0)
    x, P, g = (torch.randn(8, 8, generator=generator) for _ in range(3))
    return Problem(
        {"input": x, "basis": P},
        [Variant("ours", ours, "ours"), *(Variant(name, peer) for name, peer in peers.items())],
        lambda: {
            "output": expect("ij,jk->ik", (x, P), 8),
            "input": expect("ik,jk->ij", (g, P), 8),
            "basis": expect("ij,ik->jk", (x, g), 8),
        },
        dict.fromkeys((FORWARD, BACKWARD), limits.Work(1024, 768, (8, 8, 8))),
        g,
        ("input", "basis"),
    )


def right(input: Tensor, basis: Tensor) -> Tensor:
    return input @ basis


def right_but_slow(input: Tensor, basis: Tensor) -> Tensor:
    return torch.stack([row @ basis for row in input])


def one_element(input: Tensor, basis: Tensor) -> Tensor:
    spot = torch.zeros(8, 8)
    spot[7, 7] = 1e-3
    return input @ basis + spot


def not_finite(input: Tensor, basis: Tensor) -> Tensor:
    return (input @ basis).masked_fill(torch.eye(8, dtype=torch.bool), math.nan)


def other_shape(input: Tensor, basis: Tensor) -> Tensor:
    return (input @ basis).flatten()


def raises(input: Tensor, basis: Tensor) -> Tensor:
    return input @ basis[:3]


class WrongGradient(torch.autograd.Function):
    """A product with one element of one gradient wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, P: Tensor) -> Tensor:
        ctx.save_for_backward(x, P)
        return x @ P

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, P = ctx.saved_tensors
        grad = x.mT @ g
        grad[7, 7] += 1e-3
        return g @ P.mT, grad


def wrong_gradient(input: Tensor, basis: Tensor) -> Tensor:
    return WrongGradient.apply(input, basis)


WRONG = [
    *((wrong, way) for wrong in (one_element, not_finite, raises) for way in (FORWARD, BACKWARD)),
    (other_shape, FORWARD),
    (wrong_gradient, BACKWARD),
]
SHORT = measure.Options(1e-3, compile=False)


@pytest.mark.parametrize(("wrong", "direction"), WRONG)
def test_a_wrong_peer_is_told_and_never_the_best(
    wrong: Callable[..., Tensor], direction: str
) -> None:
    problem = small_problem(right, wrong=wrong, slow=right_but_slow)
    case = measure.measure(problem, direction, SHORT)
    variants = {variant["name"]: variant for variant in case["variants"]}
    assert [v["correct"] for v in variants.values()] == [True, False, True]
    assert case["summary"]["correct"]
    assert case["summary"]["best_peer"] == "slow"
    assert case["summary"]["ratio"] > 0
    assert variants["wrong"].get("reason", "").startswith("RuntimeError: ") is (wrong is raises)
    json.dumps(case, allow_nan=False)


@pytest.mark.parametrize(("wrong", "direction"), WRONG)
def test_wrong_results_of_ours_count_for_nothing(
    wrong: Callable[..., Tensor], direction: str
) -> None:
    case = measure.measure(small_problem(wrong, peer=right), direction, SHORT)
    assert not case["summary"]["correct"]
    assert case["summary"]["ratio"] is None
    json.dumps(case, allow_nan=False)


def test_a_gradient_is_not_judged_forward() -> None:
    case = measure.measure(small_problem(wrong_gradient, peer=right), FORWARD, SHORT)
    assert case["summary"]["correct"]


def test_a_peer_has_slack_and_ours_has_none() -> None:
    def rough(input: Tensor, basis: Tensor) -> Tensor:
        """Off by about twice the bound."""
        return input @ basis + 2 * (4 + 8) * 2.0**-24 * (input.abs() @ basis.abs())

    case = measure.measure(small_problem(right, peer=rough), FORWARD, SHORT)
    assert 1.5 < case["variants"][1]["error"] < 2.5
    assert case["summary"]["best_peer"] == "peer"
    case = measure.measure(small_problem(rough, peer=right), FORWARD, SHORT)
    assert not case["summary"]["correct"]


def test_wrong_results_of_the_library_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = functional.manifold_metric
    monkeypatch.setattr(functional, "manifold_metric", lambda coeff: truth(coeff) * 1.0001)
    args = ["--quick", "--benches", "manifold_metric", "--output", str(tmp_path)]
    assert main(args) == 1
    shown = capsys.readouterr()
    assert "error: the library's results are wrong in 2 cases: manifold_metric N16 K3" in shown.err
    assert "WRONG" in shown.out


def test_a_large_array_is_not_made() -> None:
    problem = small_problem(right, peer=right)
    problem.variants.append(Variant("large", raises, workspace=3 * 2**30))
    case = measure.measure(problem, FORWARD, SHORT)
    assert case["variants"][2]["reason"] == "would store an array of 3.0 GiB"


def test_the_fastest_peer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem(right, slow=right_but_slow, fast=right)
    options = measure.Options(1e-3, compile=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = measure.measure(problem, BACKWARD, options)
    compiled = case["variants"][-1]
    assert compiled["name"] == "compiled: fast"
    assert compiled["correct"] and compiled["seconds"]["median"] > 0

    def refuses(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(**operands: Tensor) -> Tensor:
            raise RuntimeError("no compiler here\nat all")

        return call

    monkeypatch.setattr(torch, "compile", refuses)
    case = measure.measure(problem, FORWARD, options)
    assert case["variants"][-1]["reason"] == "RuntimeError: no compiler here"
    assert case["summary"]["ratio"] > 0


@pytest.mark.full
def test_torch_compile_takes_part() -> None:
    problem = small_problem(right, peer=right_but_slow)
    case = measure.measure(problem, BACKWARD, measure.Options(1e-3, compile=True))
    assert case["variants"][-1]["correct"], case["variants"][-1]


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(functional, "manifold_metric")
    with pytest.raises(Unavailable, match=r"^neuromod_ext.functional has no manifold_metric$"):
        public("manifold_metric")


def test_large_results_are_checked_in_part_and_at_the_ends() -> None:
    a, b = torch.randn(300, 5), torch.randn(5, 200)
    expected = expect("ij,jk->ik", (a, b), 5, most=16)
    assert expected.value.shape == (16, 16)
    good = a @ b
    assert expected.error(good, torch.float32) <= 1
    for corner in ((0, 0), (299, 199), (0, 199)):
        bad = good.clone()
        bad[corner] += 1e-3
        assert expected.error(bad, torch.float32) > 1


def test_a_wide_bound_hides_no_missing_result() -> None:
    """In half precision the bound of a long sum exceeds the sum."""
    a, b = (torch.randn(4, 4096).bfloat16() for _ in range(2))
    expected = expect("ij,kj->ik", (a, b), 4096)
    assert (SLACK * 4 * 2.0**-8 * expected.scale > expected.value.abs()).all()
    got = torch.einsum("ij,kj->ik", a.float(), b.float())
    assert expected.error(got.bfloat16(), torch.bfloat16) <= 1
    assert expected.error(torch.zeros_like(got), torch.bfloat16) > SLACK
    assert expected.error(torch.stack((*got[:3], got[2])), torch.bfloat16) > 1
