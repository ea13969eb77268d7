# The two commands that matter: `make demo` and `make test`. Everything else serves them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.sotto-ready
PYTEST_WORKERS ?= 2

.PHONY: help setup demo demo-check newcomer-check test test-all check proto bench bench-check figures findings clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv from the pinned constraints (done once; the others call it)

$(READY): pyproject.toml setup.py constraints.txt scripts/setup_venv.sh
	@scripts/setup_venv.sh $(VENV)
	@touch $@

demo: $(READY)  ## train an encrypted, differentially private federation on real data
	@$(BIN)/sotto demo $(ARGS)

demo-check: $(READY)  ## five seeds: the federation learns as much as central DP-SGD (exit code says)
	@$(BIN)/python scripts/demo_check.py $(ARGS)

newcomer-check: $(READY)  ## walk README as a newcomer would, in a fresh environment: seconds and commands (ten minutes)
	@$(BIN)/python scripts/newcomer_check.py $(ARGS)

test: $(READY)  ## the test suite: a quarter of an hour on two cores
	@$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) -m "not slow" $(ARGS)

test-all: $(READY)  ## the test suite with the long runs, and examples that no run had before
	@$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) --hypothesis-profile=searching $(ARGS)

check: $(READY)  ## ruff, mypy strict, and whether the generated stubs are up to date
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PATH="$(CURDIR)/$(BIN):$$PATH" ./generate_grpc.sh --check
	@$(BIN)/python scripts/generate_schemas.py --check

proto: $(READY)  ## regenerate src/communication/generated from proto/
	@PATH="$(CURDIR)/$(BIN):$$PATH" ./generate_grpc.sh

bench: $(READY)  ## measure (ONLY=encryption|…), writes build/bench.json
	@$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY)) $(ARGS)

bench-check: $(READY)  ## the same, and whether all that is to be reached is, or is listed with its reason
	@$(BIN)/python benchmarks/bench.py --check $(if $(ONLY),--only $(ONLY)) $(ARGS)

figures: $(READY)  ## redraw docs/figures/utility from scratch: central DP-SGD, fedsgd, fedavg (some minutes)
	@$(BIN)/python scripts/figures.py --processes $(PYTEST_WORKERS) $(ARGS)

findings:  ## do public libraries still surprise as findings/ says? fetches each in a temporary folder (ONLY=name)
	@findings/run.sh $(ONLY)

clean:  ## remove what was built (keeps runs/)
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
