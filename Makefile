# For a machine that has git, make and Python 3.10 or later; everything else is installed in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Compiling all of torch takes longer than compiling what is imported, at the first import.
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# One thread a process: the tests' tensors are small, and two threads only wait for each other.
TEST_ENV  := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST    ?=
DEMO      ?=

.PHONY: help demo test lint types bench format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.run  ## generate with and without guidance, score and show it: out/demo/ (DEMO="--flags")
	$(BIN)/python scripts/demo.py $(DEMO)

test: lint  ## lint, types, import rules, then every test (PYTEST="-k apg" for some)
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.dev  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## every benchmark at full size, each beside a peer; up to hours
	@set -e; for script in benchmarks/bench_*.py; do \
		echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove the environment and what tools leave behind; out/ stays
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The stamps: an environment is made anew when its recipe changes, and left alone otherwise.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "diffsteer needs Python 3.10 or later; say which: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile -c constraints.txt setuptools torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.run
