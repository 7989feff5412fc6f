# Everything from a fresh clone: make, make demo, make test, make bench, make gpu. Needs python3 (>= 3.10), a C++ compiler and
# make; nvcc is optional. SYSTEM_TORCH=1 builds on the interpreter's own torch (>= 2.11), and needs no network if
# packages are there. ARGS="…" is passed on to what demo, test and bench run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
BUILD_TOOLS := "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
export NEUROMOD_EMULATOR := 1
# Kernels for this machine's GPUs; without one as PTX alone, which takes half as long. `make kernels` compiles for all.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '[0-9]*\.[0-9]*' | sort -u | tr -d .)
empty :=
export NEUROMOD_CUDA_ARCHS ?= $(or $(subst $(empty) ,;,$(GPUS)),80-virtual)

ifdef SYSTEM_TORCH
VENV_FLAGS := --system-site-packages
EXTRAS := papers,test
else
EXTRAS := dev
WORKERS := -n 2 --dist worksteal
endif

.DEFAULT_GOAL := build
.PHONY: build demo test test-full bench kernels gpu gpu-here lint clean

$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "neuromod_ext: expected Python >= 3.10, found " + sys.version.split()[0] + "; set PYTHON")'
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@[ -z "$(SYSTEM_TORCH)" ] || $(PY) -m pip --quiet uninstall --yes setuptools 2>/dev/null  # venv's own is too old
	@[ -z "$(SYSTEM_TORCH)" ] || $(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
	  > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth  # $(PYTHON) may be a venv's, too
	@if $(PY) -c 'import torch' 2>/dev/null; then :; \
	elif [ -n "$(SYSTEM_TORCH)" ]; then \
	  echo "neuromod_ext: SYSTEM_TORCH=1, but $(PYTHON) has no torch; install torch >= 2.11 for it" >&2; exit 1; \
	else echo "neuromod_ext: installing $(TORCH)"; $(PIP) "$(TORCH)"; fi
	@$(PIP) $(BUILD_TOOLS)
	@touch $@

# The build comes first, in view; pip's own call of it then finds everything made.
build: $(VENV)/.tools
	@$(PY) setup.py --quiet build_ext --inplace
	@$(MAKE) --no-print-directory $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "neuromod_ext: installing into $(VENV), with the packages of the demo and the tests"
	@$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

demo: build
	@$(PY) -m benchmarks.papers rotated $(ARGS)

bench: build
	@$(PY) -m benchmarks.speed $(ARGS)

# What each CUDA kernel takes of a GPU, as nvcc tells; needs none.
kernels: build
	@$(PY) -m benchmarks.kernels

# All that needs a GPU, in stages; STAGE=tests (bench, plans, stress, sanitize) for one. With SYSTEM_TORCH=1 nothing is fetched
# if the packages that the README names are there.
gpu: gpu-here $(if $(SYSTEM_TORCH),$(VENV)/.tools,build)
	@$(PY) -m benchmarks.gpu $(STAGE) $(ARGS)

gpu-here:
	@nvidia-smi -L >/dev/null 2>&1 || { echo "neuromod_ext: make gpu needs a CUDA GPU, and nvidia-smi finds none here" >&2; exit 1; }

test: build
	@$(PY) -m pytest $(WORKERS) -m "not full and not gpu" $(ARGS)

test-full: build
	@$(PY) -m pytest $(WORKERS) -m "not gpu" $(ARGS)

lint: build
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	@$(PY) -m mypy

clean:
	rm -rf build $(VENV) figures neuromod_ext/_C.*.so neuromod_ext.egg-info
