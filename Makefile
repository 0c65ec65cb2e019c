# Two commands do everything: `make run` and `make test`. Both set up first, in .venv, with pinned packages.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup run test test-slow lint package docs docs-check check bench weights gpu-check gpu-wheels
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rpo needs Python 3.11 or newer; run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)  ## a virtual environment in .venv with everything pinned

run: $(READY)  ## the whole method on the embedded world, no GPU
	$(BIN)/rpo run shapes --resume

test: $(READY)  ## the whole test suite but the slow checks, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(READY)  ## kill-and-resume in bulk, and the other checks that take minutes
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

package: $(READY)  ## build the wheel, install it alone into a fresh environment, try it in an empty folder
	rm -rf build/package && mkdir -p build/package/empty
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/package .
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/package/*.whl
	cd build/package/empty && ../venv/bin/rpo --help >/dev/null && ../venv/bin/rpo doctor
	cd build/package/empty && ../venv/bin/rpo run shapes --curate.prompts.count 60 --train.steps 20 --evaluate.prompts.count 20

docs: $(READY)  ## the documentation site, served on http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-check: $(READY)  ## the documentation site in build/site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint docs-check package test  ## everything that has to pass before a change is merged

weights: $(READY)  ## train and measure the embedded world's models: long on two cores, resumable
	$(BIN)/rpo shapes train --out src/rpo/shapes/weights
	$(BIN)/rpo shapes measure --folder src/rpo/shapes/weights

bench: $(READY)  ## trainer: pairs per second against the naive step
	$(BIN)/python benchmarks/train_step.py src/rpo/shapes/weights/base --micro-pairs 32 --side 64 --rank 0

MINUTES ?= 10
OUT ?= runs/gpu-check
gpu-check:  ## correctness and speed on a CUDA card, in MINUTES=10, results in OUT=runs/gpu-check; runs PYTHON as it is
	$(PYTHON) benchmarks/gpu_check.py --minutes $(MINUTES) --out $(OUT) $(ARGS)

GPU_PYTHON ?= 3.12
GPU_CUDA ?= 130
HAVE ?=
gpu-wheels:  ## wheels for a GPU machine without network, in .gpu-wheels; HAVE="scipy pyarrow ..." leaves out what it holds
	$(PYTHON) benchmarks/gpu_wheels.py --out .gpu-wheels --python $(GPU_PYTHON) --cuda $(GPU_CUDA) --have $(HAVE)
