# `make help` lists the targets. Everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo reproduce test gpu-gates sanitize lint format bench setup-oldest test-oldest clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## make .venv with dimkern and all it needs for development

# torch first and pinned: a looser requirement, or an isolated build, would fetch a CUDA build of several GB
$(VENV)/.ready: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard kernels/cpu/* kernels/cuda/* kernels/include/dimkern/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: setup ## train Deep InfoMax on scikit-learn's digits, probe it and draw what it learnt (about a minute)
	$(BIN)/dimkern train --data digits --objective local --estimator infonce --out runs/demo --overwrite

# BUDGET=smoke takes a minute, BUDGET=full hours; what is done is not done again
BUDGET ?= hour
CIFAR ?= data
reproduce: setup ## the paper's comparison on Fashion-MNIST (and CIFAR-10, if its files are in $(CIFAR)): table, CSV, plots
	$(BIN)/dimkern reproduce --budget $(BUDGET)
	if test -e $(CIFAR)/cifar-10-batches-bin; then $(BIN)/dimkern reproduce --budget $(BUDGET) --data cifar10 --data-root $(CIFAR); fi

test: setup ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

gpu-gates: setup ## execute and check the GPU kernels without a GPU, print what they take of the chips
	command -v nvcc >/dev/null || $(BIN)/python -m pip install --quiet $(NVCC) || echo "no nvcc: CUDA C++ is left out"
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/gpu_gates

NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
	nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85

sanitize: setup ## run the native tests under the address and undefined-behaviour sanitizers
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DDIMKERN_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/ctest --test-dir build/sanitize --output-on-failure

lint: setup ## check formatting, style, types and the emitted sources
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python kernels/emit.py --check
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: setup ## mend what `make lint` can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

NATIVE := $(filter-out %/estimators.h,$(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh'))

bench: setup ## benchmark every contender, draw the README's pictures
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks.compare --grid readme --json benchmarks/results/scaling.json --plots docs/img
	$(BIN)/python -m benchmarks.pair_mlp --images 16 32 --json benchmarks/results/pair_mlp.json
	$(BIN)/python -m benchmarks.compare --grid full --estimators infonce jsd dv --only dimkern-cpu eager --rounds 5 --no-memory --json benchmarks/results/grid.json
	$(BIN)/python -m benchmarks.compare --grid full --dtypes float32 --rounds 5 --json benchmarks/results/peers.json --plots docs/img

# The library in dimkern/_native is the one that `make setup` built: the stable ABI has to hold.
OLDEST := .venv-oldest/bin/python
setup-oldest: setup ## make .venv-oldest with the oldest torch that is supported (a download of several GB)
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet 'torch==2.10.0' numpy pytest pytest-xdist hypothesis psutil

test-oldest: setup-oldest ## run the tests of the ops and losses on the oldest torch that is supported
	PYTHONPATH=$(CURDIR) $(OLDEST) -m pytest -n 2 -m 'not slow' $(addprefix tests/test_,ops.py parity.py errors.py extremes.py estimators.py memory.py)

clean: ## remove what was built and run, and the environments
	rm -rf .venv .venv-oldest build dist runs *.egg-info
