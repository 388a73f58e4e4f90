# Everything a person needs, from a fresh clone. `make` alone lists it.
#
#   PYTHON=python3.12 make test     another interpreter (3.11 or later)
#   RESPIKE_NATIVE=0 make setup     no C++ kernels, so no compiler needed
#   VENV=/tmp/v make test           another place for the environment

PYTHON ?= python3
VENV ?= .venv
RESPIKE_NATIVE ?= 1
MODELS ?= models

export RESPIKE_NATIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
# The constraint keeps pip from replacing the torch that install_torch.py chose.
INSTALL := $(BIN)/python -m pip install --quiet --constraint $(VENV)/torch.txt

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup test check demo model system-deps clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/stamp-setup ## virtual environment in .venv, with torch (CPU build) and respike

test: $(VENV)/stamp-dev ## the tests, with all they need
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

check: $(VENV)/stamp-dev ## formatting, lint, types, architecture, device names
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_devices.py
	$(BIN)/python scripts/docs.py --check

demo: $(VENV)/stamp-plot model ## convert, run and compare a real 135M model
	$(BIN)/python demo/run.py

model: $(VENV)/stamp-venv ## download SmolLM2-135M-Instruct into models/ (95 MB)
	$(BIN)/python scripts/fetch_model.py $(MODELS)

system-deps: ## system packages that some tests can use (Debian, Ubuntu)
	$$([ "$$(id -u)" = 0 ] || echo sudo) apt-get install -y chromium

clean: ## remove the environment and caches; models/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each step runs again only when what it depends on has changed.

$(VENV)/stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: respike needs Python 3.11 or later; name one: PYTHON=python3.12 make ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/torch.txt: requirements.txt scripts/install_torch.py | $(VENV)/stamp-venv
	$(BIN)/python scripts/install_torch.py --constraint $@

# Changes only when RESPIKE_NATIVE does, so that switching it installs again.
$(VENV)/native-choice: FORCE | $(VENV)/stamp-venv
	@echo $(RESPIKE_NATIVE) | cmp -s - $@ || echo $(RESPIKE_NATIVE) > $@

SOURCES := pyproject.toml $(wildcard native/*) $(VENV)/torch.txt $(VENV)/native-choice

# dev includes plot, and both include setup.
$(VENV)/stamp-setup: $(SOURCES)
	$(INSTALL) -e .
	@touch $@

$(VENV)/stamp-plot: $(SOURCES)
	$(INSTALL) -e '.[plot]'
	@touch $(VENV)/stamp-setup $@

$(VENV)/stamp-dev: $(SOURCES)
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/stamp-setup $(VENV)/stamp-plot $@
