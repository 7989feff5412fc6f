"""What stands in the way of the kernels is said plainly, and the reference runs in their place."""

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import neuromod_ext
from neuromod_ext import _ops

ROOT = Path(neuromod_ext.__file__).parents[1]
PROGRAM = textwrap.dedent(
    """
    import sys, warnings
    warnings.simplefilter("error", RuntimeWarning)
    import torch
    import neuromod_ext as nm
    from neuromod_ext import _ops

    d = torch.load(sys.argv[1])
    for t in d.values():
        t.requires_grad_()
    layer = nm.nn.ManifoldLinear(5, 3, topology=nm.Ellipse(), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(d["P"]), layer.bias.copy_(d["b"])
    out = layer(d["x"], d["s"])
    out.sin().sum().backward()
    folded = nm.functional.interpolate_weights(d["P"], nm.Ellipse()(d["s"]))
    metric = nm.functional.manifold_metric(nm.Ellipse()(d["s"]))
    images = d["x"].reshape(-1, 1, 5)
    kernel = d["P"][:, :, None, :2]
    conv = nm.functional.manifold_conv1d(images, kernel, nm.Ellipse()(d["s"]), d["b"])
    optimizer = nm.optim.ManifoldSGD(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.step(), optimizer.step()
    vmapped = torch.vmap(lambda x, s: layer(x[None], s[None])[0])(d["x"], d["s"])
    results = [out, d["x"].grad, d["s"].grad, layer.weight.grad, folded, metric, conv,
               layer.weight, layer.bias, vmapped]
    if sys.argv[3] == "compile":
        results.append(torch.compile(layer, fullgraph=True, backend="aot_eager")(d["x"], d["s"]))
    torch.save((_ops.EXTENSION, _ops.LOAD_ERROR, [t.detach() for t in results]), sys.argv[2])
    """
)


@pytest.mark.parametrize("how", ["eager", pytest.param("compile", marks=pytest.mark.full)])
def test_the_reference_gives_the_same(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NEUROMOD_REFERENCE=1 asks for it, without a warning."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.save(
        {"x": draw(4, 5), "s": draw(4), "P": draw(3, 3, 5), "b": draw(3, 3)}, tmp_path / "in"
    )
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), how]
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with warnings.catch_warnings():
        exec(PROGRAM, {})
    extension, error, with_kernels = torch.load(tmp_path / "out")
    assert (extension, error) == (True, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NEUROMOD_REFERENCE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    extension, error, without = torch.load(tmp_path / "out")
    assert (extension, error) == (False, "NEUROMOD_REFERENCE=1 asks for the reference")
    torch.testing.assert_close(without, with_kernels, rtol=1e-12, atol=1e-12)


def test_only_1_asks_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMOD_REFERENCE", "1")
    assert _ops._load() == "NEUROMOD_REFERENCE=1 asks for the reference"
    monkeypatch.setenv("NEUROMOD_REFERENCE", "0")
    assert _ops._load() is None


def binary(tmp_path: Path, version: str) -> Path:
    path = tmp_path / "_C.so"
    path.write_bytes(b"\x7fELF\0\0neuromod_ext built against torch " + version.encode() + b"\0more")
    return path


def test_built_against(tmp_path: Path) -> None:
    assert _ops._built_against(binary(tmp_path, "2.11.0+cu130")) == "2.11.0+cu130"
    (tmp_path / "_C.so").write_bytes(b"\x7fELF nothing of ours")
    assert _ops._built_against(tmp_path / "_C.so") == "unknown"
    origin = sys.modules["neuromod_ext._C"].__file__
    assert _ops._release(_ops._built_against(Path(origin))) == _ops._release(torch.__version__)


def test_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    built = _ops._built_against(Path(sys.modules["neuromod_ext._C"].__file__))
    monkeypatch.setattr(torch, "__version__", "9.9.1+cu999")
    assert _ops._load() == (
        f"neuromod_ext._C was built against torch {built}, but torch 9.9.1+cu999 is running; "
        "rebuild it"
    )


def test_a_patch_release_is_no_other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor = _ops._release(torch.__version__)
    monkeypatch.setattr(torch, "__version__", f"{major}.{minor}.99+local")
    assert _ops._load() is None


def spec_of(origin: Path | None):
    class Spec:
        pass

    spec = Spec()
    spec.origin = None if origin is None else str(origin)
    return lambda name: spec


def test_no_binary_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for find in (lambda name: None, spec_of(None)):
        monkeypatch.setattr(_ops.importlib.util, "find_spec", find)
        reason = _ops._load()
        assert reason is not None
        assert reason.startswith("neuromod_ext._C is not built for this interpreter; run `make`")


def test_a_binary_that_does_not_load_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        _ops.importlib.util, "find_spec", spec_of(binary(tmp_path, torch.__version__))
    )
    monkeypatch.setitem(sys.modules, "neuromod_ext._C", None)  # import raises ImportError
    monkeypatch.delattr(neuromod_ext, "_C", raising=False)
    reason = _ops._load()
    assert reason is not None
    assert reason.startswith(
        f"neuromod_ext._C, built against torch {torch.__version__}, does not load"
    )
    assert reason.endswith("; rebuild it")


def test_missing_kernels_warn() -> None:
    """In a process whose _C cannot be found, importing warns, and works."""
    program = textwrap.dedent(
        """
        import importlib.util, warnings
        find = importlib.util.find_spec
        hide = lambda name, *a: None if name == "neuromod_ext._C" else find(name, *a)
        importlib.util.find_spec = hide
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import neuromod_ext as nm
        (text,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
        assert "the slower reference runs: neuromod_ext._C is not built" in text, text
        from torch import ones
        assert nm.functional.manifold_linear(ones(2, 3), ones(1, 4, 3), ones(2, 1)).sum() == 24
        """
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("NEUROMOD_REFERENCE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_here_did_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _ops._load() is None
