"""What the README says is so."""

import re
from pathlib import Path

import torch

import neuromod_ext as nm
from neuromod_ext import analysis, continual, plotting

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_examples_run():
    """Each goes on with the names of those before."""
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(others) == 2
    torch.manual_seed(0)
    names: dict = {}
    exec(first, names)
    model, plain, x = names["model"], names["plain"], names["x"]
    assert not any(isinstance(m, nm.nn.ManifoldLayer) for m in plain.modules())
    torch.testing.assert_close(plain(x), model(x, torch.full((64,), 0.25)), rtol=1e-4, atol=1e-4)
    for code in others:
        exec(code, names)
        assert names["y"].shape == (64, 10)
    for weight in names["model"].module[1::2]:
        assert weight.weight.grad.abs().sum() > 0


def test_every_topology_is_in_the_table():
    for name in nm.topology.__all__:
        if name not in ("Topology", "Product"):
            assert f"`{name}(" in README, name


def test_every_public_function_and_layer_is_named():
    for name in (*nm.functional.__all__, *nm.nn.__all__):
        stem = re.sub(r"^manifold_conv[123]d$", "manifold_conv1d/2d/3d", name)
        if name != "ManifoldLayer":
            assert re.search(rf"[`.]{stem}`", README), name


def test_what_streams_of_tasks_need_is_named():
    kinds = {"Clustering", "MantelTest", "Score", "SimilarityHistogram", "Task", "TaskStream"}
    elsewhere = {"plot_accuracy", "plot_manifold_path", "principal_components"}  # of manifolds
    parts = {"augmentations", "rotate"}  # what the streams are made of
    for name in (
        {*analysis.__all__, *continual.__all__, *plotting.__all__} - kinds - elsewhere - parts
    ):
        assert re.search(rf"[`.]{name}`", README), name
