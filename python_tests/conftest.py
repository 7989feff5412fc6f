"""What every test file shares: one thread, no state left behind, and the backends of the ops.

``pytest -m "not full"`` is the quick tier, ``pytest`` the whole; ``--backend cuda`` takes only what
runs on that backend.
"""

import gc
import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import neuromod_ext._ops  # noqa: F401  (registers the ops)

BACKENDS = ("cpu", "emulated", "cuda")
LIBRARY = Path(__file__).parents[1] / "build" / "libneuromod_emulated.so"
EMULATED = Path(os.environ.get("NEUROMOD_EMULATED", LIBRARY))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, help="only what runs on this backend")
    parser.addoption("--share", type=float, default=1.0, help="of the random cases on a backend")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --backend, files that have nothing for it are not imported: some need more packages."""
    if config.getoption("backend") is None or collection_path.suffix != ".py":
        return None
    return True if "backend: Backend" not in collection_path.read_text() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("backend")
    if wanted is not None:
        calls = [(item, getattr(item, "callspec", None)) for item in items]
        items[:] = [item for item, call in calls if call and call.params.get("backend") == wanted]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A kernel that fails takes the GPU from its process, where no test can pass any more.

    pytest-xdist goes on in a fresh process.
    """
    report = yield
    if report.failed and call.excinfo and torch.cuda.is_initialized():
        from benchmarks.speed import harness

        if harness.is_lost(torch.device("cuda")):
            said = f"{item.nodeid} lost the GPU: {call.excinfo.exconly()}"
            if "PYTEST_XDIST_WORKER" not in os.environ:
                pytest.exit(said, 1)
            print(said, file=sys.__stderr__, flush=True)
            os._exit(1)
    return report


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    torch.set_num_threads(1)
    gc.collect(0)


@dataclass(frozen=True)
class Backend:
    """Where ops run: a name, the library's op namespace and the device of its tensors."""

    name: str
    namespace: Any
    device: str
    share: float  # of the cases that the CPU's kernels get: the emulator is slow

    def op(self, name: str) -> Callable[..., Any]:
        return getattr(self.namespace, name).default

    def cases(self, count: int) -> int:
        return max(1, int(count * self.share))


@pytest.fixture(
    scope="session",
    params=[name for name in BACKENDS if name != "cuda" or torch.cuda.is_available()],
)
def backend(request: pytest.FixtureRequest) -> Backend:
    share = request.config.getoption("share")
    if request.param == "emulated":
        if not EMULATED.exists():
            pytest.fail(
                f"{EMULATED.name}, the CUDA kernels compiled for the CPU, is not built: run `make`"
            )
        torch.ops.load_library(str(EMULATED))
        return Backend("emulated", torch.ops.neuromod_emulated, "cpu", 0.24 * share)
    return Backend(request.param, torch.ops.neuromod_ext, request.param, share)
