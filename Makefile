# `make help` lists the targets. Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
# Test processes; two suit the smallest machine that runs the tests in CI.
WORKERS ?= 2
# Arguments for the program behind a target, such as: make test ARGS="-k lif", make demo ARGS="--epochs 10"
ARGS ?=

# Threads that wait for work sleep instead of spinning: on two busy cores training is several times faster so.
export OMP_WAIT_POLICY ?= passive

VENV := .venv
SHELL := /bin/bash
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test timm-suite lint format bench kernel space clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## Set up .venv with this package (editable) and its tools

$(STAMP): pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time: PyTorch is large)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar on --editable '.[dev]' \
		| grep --line-buffered -E '^(Collecting|Successfully|Installing collected|ERROR)' | cut -c 1-100; \
		exit $${PIPESTATUS[0]}
	@touch $@

demo: $(STAMP)  ## Train, save, reload and draw a small spiking network on real handwritten digits
	@$(BIN)/timm-gac demo $(ARGS)

test: $(STAMP)  ## Run all tests (on a GPU the kernels run on it, elsewhere in Triton's interpreter)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

timm-suite: $(STAMP)  ## Run timm's own model tests on every registered model
	$(BIN)/python tests/timm_suite/run.py --models all $(if $(ARGS),-- $(ARGS))

lint: $(STAMP)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Apply style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Time the kernels against baselines on this machine
	$(BIN)/timm-gac bench kernels $(ARGS)

kernel: $(STAMP)  ## Stage the kernels for the Kernel Hub in build/gac-kernels
	$(BIN)/python kernels/stage.py $(ARGS)

space: $(STAMP)  ## Serve the demonstration Space on this machine, http://127.0.0.1:7860
	@$(BIN)/python -c 'import gradio' 2>/dev/null \
		|| $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --editable '.[space]'
	$(BIN)/python hub/space/app.py $(ARGS)

clean:  ## Remove build products and caches, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
