"""What each CUDA kernel takes of a GPU: ``python -m benchmarks.kernels``, or ``make kernels``.

nvcc compiles every kernel of the library for each architecture and says how many registers, how
much static shared memory and stack each takes, and whether registers are spilled to memory. It
needs no GPU. A kernel that spills fails, unless it is float64's, where the results matter and not
the speed, or a plain one that serves as the oracle of faster ones. The report is kept as
``benchmarks/results/kernels.json`` and, to be read, ``kernels.md``.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ARCHITECTURES = ("80", "90a", "100")
PLAIN = ("manifold_linear.cu",)  # files of such
FLAGS = ("-std=c++17", "--expt-relaxed-constexpr", "-Wno-deprecated-gpu-targets")
NUMBERS = ("registers", "shared", "stack", "spilled")
TYPES = {"__nv_bfloat16": "bfloat16", "__half": "float16", "float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel, for one architecture; memory in bytes."""

    source: str
    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def fails(self) -> bool:
        """Whether it spills and should not."""
        return self.spilled > 0 and "float64" not in self.kernel and self.source not in PLAIN


def sources() -> list[Path]:
    """The library's kernels, without the emulator's tests."""
    return sorted(p for p in (ROOT / "csrc").rglob("*.cu") if p.parent.name != "emulator")


def resources(nvcc: str, source: Path) -> str:
    """Compile a file for all architectures; what ptxas says of its kernels.

    Raises:
        SystemExit: It does not compile.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *targets, "-Xptxas=-v", f"-I{ROOT / 'csrc'}", "-c", str(source)]
        done = subprocess.run(
            [*command, "-o", os.path.join(folder, "kernels.o")], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise SystemExit(
            f"{done.stderr}\nneuromod_ext: {source.relative_to(ROOT)} does not compile"
        )
    return done.stderr


def parse(source: Path, said: str) -> Iterator[Usage]:
    """The kernels of a file, by what ptxas says."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, said, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield Usage(
            source.name,
            name,
            arch,
            int(registers),
            int(shared[1]) if shared else 0,
            int(stack),
            int(stores) + int(loads),
        )


def short_names(mangled: list[str]) -> dict[str, str]:
    """Names as a reader would write them, by what the linker calls the kernels."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return dict(zip(mangled, map(shorten, done.stdout.splitlines()), strict=True))


def shorten(demangled: str) -> str:
    """``void neuromod::(anonymous namespace)::f<float, 4>(Params)`` is ``f<float32, 4>``."""
    name = demangled.replace("(anonymous namespace)::", "").replace("neuromod::", "")
    name = re.sub(r"\((?:int|long|bool)\)", "", name.removeprefix("void "))
    name = name.partition(">(")[0] + ">" if ">(" in name else name.partition("(")[0]
    return re.sub(r"\w+", lambda word: TYPES.get(word[0], word[0]), name)


def table(found: list[Usage]) -> Table:
    """One row a kernel and architecture; those that fail are red."""
    sheet = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    sheet.add_column("kernel", no_wrap=True)
    sheet.add_column("arch", no_wrap=True)
    for name in ("registers", "shared B", "stack B", "spilled B"):
        sheet.add_column(name, justify="right", no_wrap=True)
    for usage in found:
        numbers = (usage.registers, usage.shared, usage.stack, usage.spilled)
        style = "red" if usage.fails else ""
        sheet.add_row(usage.kernel, f"sm_{usage.arch}", *map(str, numbers), style=style)
    return sheet


def markdown(found: list[Usage], about: str) -> str:
    """The report to be read: one row a kernel, its numbers by architecture where they differ."""
    kernels: dict[tuple[str, str], list[Usage]] = {}
    for usage in found:
        kernels.setdefault((usage.source, usage.kernel), []).append(usage)
    plain = ", ".join(f"`{name}`" for name in PLAIN)
    lines = [
        "# What each CUDA kernel takes of a GPU",
        "",
        f"{about}, for {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}, in this order where",
        "they differ. Shared memory is the static part alone; with the dynamic part no kernel has",
        "more than 99 KiB, which each launch asserts. Kernels of float64 and the plain ones of",
        f"{plain}, oracles of the others, may spill. By `make kernels`.",
        "",
        "| source | kernel | registers | shared bytes | stack bytes | spilled bytes |",
        "|---|---|---|---|---|---|",
    ]
    for (source, kernel), rows in kernels.items():
        columns = [[getattr(row, name) for row in rows] for name in NUMBERS]
        shown = [str(c[0]) if len(set(c)) == 1 else " / ".join(map(str, c)) for c in columns]
        lines.append(f"| {source} | `{kernel}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def write(found: list[Usage], nvcc: str, folder: Path) -> None:
    """Keep the report."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", version)
    about = f"nvcc {release[1] if release else 'of unknown release'}"
    record = {"compiler": about, "kernels": [asdict(usage) for usage in found]}
    (folder / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "kernels.md").write_text(markdown(found, about))


def main() -> int:
    """Compile, print the table and keep it; 1 if a kernel spills that should not."""
    nvcc = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()
    if nvcc is None:
        print(
            "neuromod_ext: make kernels needs nvcc, which was not found; install the CUDA toolkit "
            "or set CUDACXX to nvcc's path",
            file=sys.stderr,
        )
        return 1
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    files = sources()
    with ThreadPoolExecutor(jobs) as pool:
        said = pool.map(partial(resources, nvcc), files)
        found = [
            usage for file, text in zip(files, said, strict=True) for usage in parse(file, text)
        ]
    names = short_names(sorted({usage.kernel for usage in found}))
    found = [replace(usage, kernel=names[usage.kernel]) for usage in found]
    found = list({(u.kernel, u.arch): u for u in found}.values())  # some stand in several files
    found.sort(key=lambda usage: (usage.kernel, ARCHITECTURES.index(usage.arch)))
    width = max(len(usage.kernel) for usage in found) + 60
    Console(width=max(Console().width, width)).print(table(found))
    write(found, nvcc, RESULTS)
    failing = [f"{usage.kernel} (sm_{usage.arch})" for usage in found if usage.fails]
    if failing:
        print(f"neuromod_ext: registers are spilled by {', '.join(failing)}", file=sys.stderr)
        return 1
    others = sum(usage.spilled > 0 for usage in found)
    print(f"{len(found)} kernels; {others} spill registers, all plain or float64's")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
