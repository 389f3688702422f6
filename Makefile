# One command each, from a fresh clone: `make nano` trains the tiny model, `make test` proves the tree.
# The rest is set-up that they share: a virtual environment in .venv, installed once.

PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= test
WORKDIR ?= runs/nano
ARGS    ?=

BIN   := $(VENV)/bin
comma := ,
# one stamp a set of extras: a second call installs nothing, a changed pyproject.toml installs again
CORE  := $(VENV)/.installed
TEST  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help nano test lint clean

help:  ## Show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  EXTRAS=$(EXTRAS)  WORKDIR=$(WORKDIR)  ARGS=$(ARGS)"
	@echo "  make nano WORKDIR=/some/folder ARGS='--config.rl.steps=10'"
	@echo "  make test EXTRAS=test,parity   also compares with the reference model in torch"

nano: $(CORE)  ## Train the tiny model through all stages on this machine; a second call resumes
	$(BIN)/python -m trimpi_jax.train --config configs/nano.py --workdir $(WORKDIR) $(ARGS)

test: lint  ## Lint, types, stairs, then every test; ARGS go to pytest
	$(BIN)/python -m pytest $(ARGS)

lint: $(TEST)  ## Lint, format, types and stairs only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

clean:  ## Remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("Python " + v + " is too old: trimpi_jax needs 3.11 or later. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# editable, so that the configs you edit are the configs that run
$(CORE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	@touch $@

$(TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]'
	@touch $@ $(CORE)
