# The whole project in a few commands; `make help` lists them.
#
# Variables, all optional, on the command line:
#   SUITE=classic      suite to run (without it: `quick`, on an accelerator `classic`)
#   ARGS="--seeds 5"   further arguments of the command
#   PYTHON=python3.12  interpreter to build .venv with (default python3, >= 3.11)
#   ACCEL=cuda12       jax build: cpu, cuda12, cuda13, tpu (default: what is found)
#   WHEELS=folder      install from wheels in a folder, without any network
#   SYSTEM=1           use the jax that PYTHON already has
#   WORKERS=2          processes that share the tests, by files

PYTHON ?=
ACCEL ?=
WHEELS ?=
SYSTEM ?=
SUITE ?=
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
# In single quotes: the shell takes folders with blanks as they are.
SETUP = PYTHON='$(PYTHON)' ACCEL='$(ACCEL)' WHEELS='$(WHEELS)' SYSTEM='$(SYSTEM)' \
	EXTRAS='$(1)' sh tools/install.sh

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install benchmark leaderboard test test-long test-lowest lint format docs \
	wheels clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables (make benchmark SUITE=classic):"
	@awk '/^#   [A-Z]+=/ { sub(/^# /, ""); print }' Makefile

install:  ## make .venv with everything (done by the commands below, too)
	@$(call SETUP,test)

benchmark: install  ## run what is missing of a suite, then draw its leaderboard
	@$(BIN)/offrl benchmark $(SUITE) $(ARGS)

leaderboard: install  ## page and Markdown of results/SUITE, else of all below results/
	@$(BIN)/offrl leaderboard results$(addprefix /,$(SUITE)) --format html \
		--out results$(addprefix /,$(SUITE))/leaderboard.html $(ARGS)
	@$(BIN)/offrl leaderboard results$(addprefix /,$(SUITE)) --format md \
		--out results$(addprefix /,$(SUITE))/leaderboard.md $(ARGS)

test: install  ## the tests, in minutes
	@$(BIN)/python -m pytest --durations=10 -n $(WORKERS) --dist worksteal $(ARGS)

test-long: install  ## every test, the long ones too
	@OFFRL_OPTIMISE=1 $(BIN)/python -m pytest --durations=10 -n $(WORKERS) \
		--dist worksteal -m 'not gpu' $(ARGS)

test-lowest:  ## the tests with the lowest versions that pyproject.toml admits
	@$(or $(PYTHON),python3) -m venv --clear .venv-lowest
	@.venv-lowest/bin/python tools/lowest.py >.venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install --disable-pip-version-check \
		--constraint .venv-lowest/lowest.txt --editable '.[test]'
	@.venv-lowest/bin/python -m pytest $(ARGS)

lint:  ## style, types and the rules of who may import whom
	@$(call SETUP,test dev)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

format:  ## rewrite the sources in the house's format
	@$(call SETUP,test dev)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs:  ## build the documentation into build/docs
	@$(call SETUP,test docs)
	@$(BIN)/mkdocs build --strict --quiet
	@echo "build/docs/index.html"

wheels:  ## download what an install without network needs: make wheels WHEELS=folder
	@PYTHON='$(PYTHON)' ACCEL='$(ACCEL)' WHEELS='$(WHEELS)' EXTRAS='test dev' \
		sh tools/install.sh --wheels

clean:  ## remove .venv, builds and caches; never results
	rm -rf .venv .venv-lowest build dist .pytest_cache .ruff_cache .import_linter_cache
	find offrl_jax tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
