"""torch.export and AOTInductor: dynamic batch, values, and the ops kept in the graph."""

from pathlib import Path

import pytest
import torch
from compositions import WITHOUT_OPS, Composition, central_first, every
from sampling import Draw
from torch import Tensor, nn
from torch.export import Dim

import neuromod_ext as nm

ONE_CONDITION = "manifold_linear-one_condition"


class Wrapped(nn.Module):
    def __init__(self, entry: Composition) -> None:
        super().__init__()
        self.entry = entry

    def forward(self, *args: Tensor) -> Tensor:
        return self.entry.call(*args)


def exported(
    entry: Composition, dtype: torch.dtype = torch.float64
) -> torch.export.ExportedProgram:
    args = entry.make(Draw(entry.id, dtype), 11)
    shapes = tuple({0: Dim("batch", min=2)} if batched else None for batched in entry.batched)
    with torch.no_grad():
        return torch.export.export(Wrapped(entry), args, dynamic_shapes=(shapes,))


def rounds_otherwise(entry: Composition) -> bool:
    """Whether a call for any batch rounds otherwise than one for a given batch.

    A convolution runs on the op, whatever its plan would be; one condition's weight is stored; a
    gain scales the input, not the weight.
    """
    if entry.subject in ("gain_linear", "NeuroModNet"):
        return True
    return ("onv" in entry.subject and any(entry.batched)) or entry.id == ONE_CONDITION


@every
def test_export(entry: Composition) -> None:
    program = exported(entry)
    run = program.module()
    for batch in (11, 13, 2):
        args = entry.make(Draw(entry.id, torch.float64), batch)
        torch.testing.assert_close(run(*args), entry.definition(*args), rtol=1e-9, atol=1e-9)
    for stage in (program, program.run_decompositions()):
        targets = [str(node.target) for node in stage.graph.nodes if node.op == "call_function"]
        ours = any(target.startswith("neuromod_ext.") for target in targets)
        assert ours == (entry.subject not in WITHOUT_OPS), targets


@central_first
def test_export_round_trip(entry: Composition, tmp_path: Path) -> None:
    args = entry.make(Draw(entry.id, torch.float64), 5)
    torch.export.save(exported(entry), tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    if rounds_otherwise(entry):
        torch.testing.assert_close(run(*args), entry.call(*args), rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(run(*args), entry.call(*args))


@pytest.mark.full
@every
def test_aot_inductor(entry: Composition, tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(
        exported(entry, torch.float32), package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    for batch in (11, 3):
        args = entry.make(Draw(entry.id, torch.float32), batch)
        torch.testing.assert_close(run(*args), entry.definition(*args))


def test_export_of_a_conditioned_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    converted = nm.convert(model, nm.Torus()).eval()
    x, s = torch.randn(5, 1, 4, 4), torch.rand(5, 2)
    batch = Dim("batch", min=2)
    program = torch.export.export(converted, (x, s), dynamic_shapes=({0: batch}, {0: batch}))
    for n in (5, 9):
        x, s = torch.randn(n, 1, 4, 4), torch.rand(n, 2)
        torch.testing.assert_close(program.module()(x, s), converted(x, s))
    gone = program.module()(x, torch.full((9, 2), float("inf")))
    assert gone.isnan().all()  # out of the domain, where nothing can raise


def test_export_of_a_folded_model_needs_nothing_of_ours() -> None:
    converted = nm.convert(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), nm.Ellipse())
    folded = nm.fold(converted, 0.3)
    x = torch.randn(5, 4)
    program = torch.export.export(folded, (x,))
    assert not any("neuromod" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), converted(x, torch.full((5,), 0.3)))
