# make demo and make test work in a fresh clone: they create the environment .venv first.

# Any Python from 3.10 to 3.13: make test PYTHON=python3.12
PYTHON ?= $(shell for python in python3 python python3.13 python3.12 python3.11 python3.10; do \
	"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
		&& { echo "$$python"; break; }; done)
VENV ?= .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
DEMO_CONFIG ?= configs/mambavision/mambavision_digits.yaml
SEGMENTATION_CONFIG ?= configs/mamba_vision/upernet_mamba_vision_digits.py

.PHONY: help env demo demo-detection demo-segmentation test test-long test-slurm soak bench bench-gpu lint format docs coverage clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 19

env: $(READY)  ## Create the environment

demo: $(READY)  ## Train, validate and predict on handwritten digits, on the CPU; DEMO_CONFIG names the recipe
	$(BIN)/python assets/demo/classification.py --config $(DEMO_CONFIG)

demo-detection: $(READY)  ## Train, score and predict with Mask R-CNN on digits on photographs, on the CPU
	$(BIN)/python assets/demo/detection.py

demo-segmentation: $(READY)  ## Train, score and predict with UPerNet on digits on photographs, on the CPU
	$(BIN)/python assets/demo/segmentation.py --config $(SEGMENTATION_CONFIG)

test: $(READY) lint  ## Run all tests, or some: make test TESTS=tests/kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(TESTS)

coverage: $(READY)  ## Run all tests and show which lines they execute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
		--cov=mambavision --cov=vision_kernels --cov=engine --cov-report=term:skip-covered $(TESTS)

test-long: $(READY)  ## Run the tests that take too long for every change: sanitizers, fuzzing, killed runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(or $(TESTS),$(wildcard tests/long/*.py))

test-slurm: $(READY)  ## Run the scripts of all tasks as jobs of a local Slurm, which is installed if necessary
	sh tests/slurm/install.sh
	$(BIN)/python -m pytest tests/slurm/jobs.py

soak: $(READY)  ## Train for 5000 steps and check memory, open files and leftover workers
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

bench: $(READY)  ## Measure the kernels and models on this machine's CPU
	$(BIN)/python kernels/benchmarks/cpu.py

bench-gpu: $(READY)  ## Build, check and measure the kernels and models on this machine's GPU
	PYTHON=$(BIN)/python bash kernels/benchmarks/gpu.sh output/gpu

lint: $(READY)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(READY)  ## Fix style and formatting as far as possible
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## Build the documentation into output/site; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## Remove the environment and caches, but not output/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(READY): requirements.txt pyproject.toml setup.py kernels/setup.py $(wildcard kernels/csrc/* kernels/csrc/*/*) .packaging/opencv-python/pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.10 to 3.13 found; name one: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "error: $(PYTHON) cannot create environments; on Debian and Ubuntu install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e '.[dev]'
	@$(BIN)/python -c 'from vision_kernels.native import why_unavailable; \
		print("C++ kernels:", why_unavailable("baseline") or "built")'
	@touch $@
