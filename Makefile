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

# Test processes start Python more than a hundred times: each would compile this package anew where none may keep that.
testing := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

# Adds the packages of an extra to .venv.
add = $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --editable '.[$(1)]'

.DEFAULT_GOAL := help
.PHONY: help install demo check lint types test wheel test-oldest timm-suite format tokens docs bench runs kernel space release \
	check-tag publish clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## Set up .venv with this package (editable) and its tools

# pip compiles to bytecode on one core, which takes half a minute longer than on two. Packages may have files that are no
# code of this Python: compileall then says so at its end, and has compiled the others.
$(STAMP): pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time: PyTorch is large)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar on --editable '.[dev]' \
		| grep --line-buffered -E '^(Collecting|Successfully|Installing collected|ERROR)' | stdbuf -oL cut -c 1-100; \
		exit $${PIPESTATUS[0]}
	@$(BIN)/python -m compileall -qq --workers 0 -x '/tests/' $(VENV)/lib/python*/site-packages || true
	@touch $@
	@echo "Done. 'source $(VENV)/bin/activate' puts timm-gac on the path; 'make demo' tries it; 'make help' lists the rest."

demo: $(STAMP)  ## Train, save, reload and draw a small spiking network on real handwritten digits
	@$(BIN)/timm-gac demo $(ARGS)

# The tests come last: their closing line is the one that counts them.
check: $(STAMP)  ## Run all checks, as continuous integration does: lint, types, wheel, test
	@$(MAKE) --no-print-directory --jobs=2 --output-sync lint types wheel
	@$(MAKE) --no-print-directory test

lint: $(STAMP)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Check types
	$(BIN)/mypy

test: $(STAMP)  ## Run all tests (on a GPU the kernels run on it, elsewhere in Triton's interpreter)
	$(testing) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

wheel: $(STAMP)  ## Build the wheel, compare its requirements with its imports, import it from a second environment
	rm -rf build/wheel build/lib build/bdist.*
	@echo "Building the wheel"
	@$(BIN)/python -m build --wheel --outdir build/wheel > build-wheel.log 2>&1 || { cat build-wheel.log; exit 1; }
	@rm build-wheel.log
	$(BIN)/python tools/check_wheel.py build/wheel

test-oldest:  ## Run all tests with the oldest supported versions: torch 2.11, timm 1.0.31 (.venv-oldest)
	@echo "Setting up .venv-oldest (a few minutes the first time: PyTorch is large)"
	@$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check --no-input --quiet \
		--editable '.[test]' --constraint tests/oldest.txt
	$(testing) .venv-oldest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

timm-suite: $(STAMP)  ## Run timm's own model tests on every registered model
	$(BIN)/python tests/timm_suite/run.py --models all $(if $(ARGS),-- $(ARGS))

format: $(STAMP)  ## Apply style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tokens: $(STAMP)  ## Count tokens, longest function and file, words of README.md
	@$(BIN)/python tools/count_tokens.py $(ARGS)

docs: $(STAMP)  ## Build the documentation as a site in build/site
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings_handlers.python' 2>/dev/null || $(call add,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean --site-dir build/site $(ARGS)

bench: $(STAMP)  ## Time the kernels against baselines on this machine
	$(BIN)/timm-gac bench kernels $(ARGS)

runs: $(STAMP)  ## Repeat the runs behind docs/results.md: make runs ARGS="seeds published" (on a GPU, with cifar100.npz)
	PATH="$(abspath $(BIN)):$$PATH" sh tools/runs.sh $(ARGS)

kernel: $(STAMP)  ## Stage the kernels for the Kernel Hub in build/gac-kernels
	$(BIN)/python kernels/stage.py $(ARGS)

space: $(STAMP)  ## Serve the demonstration Space on this machine, http://127.0.0.1:7860
	@$(BIN)/python -c 'import gradio' 2>/dev/null || $(call add,space)
	$(BIN)/python hub/space/app.py $(ARGS)

release: $(STAMP)  ## Build wheel and source distribution in dist/ and check them
	@$(BIN)/python -c 'import twine' 2>/dev/null || $(call add,release)
	rm -rf dist build/wheel build/lib build/bdist.*
	@mkdir -p build
	@echo "Building the wheel, the source distribution, and the wheel from that (about a minute)"
	@for out in "--wheel --outdir build/wheel" "--outdir dist"; do \
		$(BIN)/python -m build $$out > build/release.log 2>&1 || { cat build/release.log; exit 1; }; done
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tools/check_wheel.py dist --same-as build/wheel
	@echo "Files of the source distribution (tar -tzf dist/*.tar.gz names them):"
	@tar -tzf dist/*.tar.gz | grep -v '/$$' | cut -d / -f 2 | sort | uniq -c
	@ls -sh1 dist

check-tag: $(STAMP)  ## Check that tag, version, CHANGELOG.md and dist/ are of one release
	$(BIN)/python tools/publish.py --only package --check

publish: release kernel  ## Show what would be published where; with PUBLISH=yes publish it
	$(BIN)/python tools/publish.py $(if $(filter yes,$(PUBLISH)),--publish) $(ARGS)

clean:  ## Remove build products and caches, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
