# Each target installs what it needs into .venv first; nothing else on the machine is touched.
# `make demo` runs the command on the checkpoint that ships, `make test` proves the whole house.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test test-core test-torch test-tf test-flax test-deep lint format bench docs clean

demo: $(VENV)/.demo
	$(BIN)/optlm demo

# A process for each framework and one for what belongs to none, two at a time: compiling takes one
# core. The longest begin.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 test-tf test-flax test-torch test-core

test-core: $(VENV)/.dev
	$(BIN)/python -m pytest --wing torch -m 'not wing and not deep'

test-torch: $(VENV)/.dev
	$(BIN)/python -m pytest --wing torch -m 'wing and not deep'

test-tf: $(VENV)/.dev
	$(BIN)/python -m pytest --wing tf -m 'wing and not deep'

test-flax: $(VENV)/.dev
	$(BIN)/python -m pytest --wing flax -m 'wing and not deep'

# The long versions: tests marked deep as well, and ten times the examples of a property.
test-deep: lint
	$(BIN)/python -m pytest --wing torch -m '' --hypothesis-profile deep
	$(BIN)/python -m pytest --wing tf -m wing --hypothesis-profile deep
	$(BIN)/python -m pytest --wing flax -m wing --hypothesis-profile deep

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.bench
	$(BIN)/python -m tests.benchmarks.run

# Rewrites the tables that come from code; the suite compares them.
docs: $(VENV)/.dev
	$(BIN)/python -m tests.tables

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is newer than what it was installed from, so a second run installs nothing.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo 'installing into $(VENV), once'
	@$(PIP) --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo 'installing into $(VENV), once'
	@$(PIP) --editable '.[all,dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) --editable '.[all,dev,bench]'
	@touch $@

# Where the system's Python comes without ensurepip, its own pip fills the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'optlm needs Python 3.11 or newer; name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
