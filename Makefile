# Needs make and Python 3.11 or newer; everything else goes into .venv. pip is used as this machine has it configured.

PYTHON ?= python3
WORKDIR ?= runs/$(if $(filter real,$(MAKECMDGOALS)),real,quickstart)
FRESH ?=
ARGS ?=
PIPFLAGS ?= -qq
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

VENV := .venv$(patsubst constraints%.txt,%,$(notdir $(CONSTRAINTS)))
BIN := $(VENV)/bin
CONFIG := experiments/tiny.py:tldr,online,dpo
export WORKDIR

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart real test test-all check lint format-check types format assets clean fresh-workdir

help:  ## this list
	@echo "make TARGET [PYTHON=python3.12] [CONSTRAINTS=constraints-jax-0.11.txt] [ARGS=...], where TARGET is"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s%s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/installed fresh-workdir  ## the main job in WORKDIR (runs/quickstart); again: its results; FRESH=1: from the start
	$(BIN)/python -m oaif_jax.train --config=$(CONFIG) --workdir="$(WORKDIR)" $(ARGS)

real: $(VENV)/installed-real  ## SmolLM2 learns to judge and is aligned by it, in WORKDIR (runs/real), in 22 minutes or an hour; again: goes on
	$(BIN)/python -m launch.real --workdir="$(WORKDIR)" $(ARGS)

# A process for each core, up to 4 GB each; the tests of a file stay together, since they share what is slow to make.
test: $(VENV)/installed-test  ## the tests but for slow ones, in WORKERS=2 processes, or ARGS="tests/test_losses.py -k dpo"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-all: ARGS += --all
test-all: test  ## all tests, slow ones too

check: lint format-check types  ## lint, format check and types

lint: $(VENV)/installed-test  ## ruff's rules
	$(BIN)/ruff check .

format-check: $(VENV)/installed-test  ## whether `make format` would change a file
	$(BIN)/ruff format --check .

# The variable keeps pyright from asking the network for a newer pyright.
types: $(VENV)/installed-test  ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-test  ## formats the files, and mends what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

assets: $(VENV)/installed  ## trains the tiny world's assets anew (about two hours)
	$(BIN)/python -m launch.assets $(ARGS)

clean:  ## removes .venv, caches and build files; keeps runs
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache build dist *.egg-info
	find oaif_jax experiments launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

# XLA on CPU was 1.3 times faster with huge pages, which glibc's malloc asks for only when told (a gradient step on two
# cores: 1.27 s instead of 1.7 s). Other C libraries ignore this.
quickstart real test test-all assets: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# --- the environment: made once, and installed into again when setup.py or the constraints have changed

python_version = $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
python_is_new = $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)
venv_works = $(shell $(BIN)/python -m pip --version 2>/dev/null)
wanted = wanted Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11
require_python = $(if $(filter True,$(python_is_new)),,$(error \
	$(PYTHON) $(if $(python_version),is Python $(python_version),does not run), $(wanted)))

pip_install = $(BIN)/python -m pip install $(PIPFLAGS) --disable-pip-version-check -c $(CONSTRAINTS)

$(VENV)/installed: EXTRA :=
$(VENV)/installed-test: EXTRA := [test]
$(VENV)/installed-real: EXTRA := [real]
# setuptools comes first and pinned, since pip's own isolated build would take the newest.
$(VENV)/installed $(VENV)/installed-test $(VENV)/installed-real: setup.py $(CONSTRAINTS)
	$(if $(venv_works),,$(require_python))
	$(if $(venv_works),,@echo "Making $(VENV) with Python $(python_version) ..." && $(PYTHON) -m venv --clear $(VENV))
	@echo "Installing oaif_jax$(EXTRA) and its pinned dependencies into $(VENV), a minute or two the first time ..."
	@$(pip_install) setuptools
	@$(pip_install) --no-build-isolation -e '.$(EXTRA)'
	@touch $(VENV)/installed $@

# --- FRESH=1 removes a run and nothing else: never this directory, one above it or above the home directory
fresh-workdir:
	$(if $(strip $(WORKDIR)),,$(error WORKDIR is empty, wanted a directory for the run))
ifeq ($(FRESH),1)
	@refuse() { echo "FRESH=1 does not remove WORKDIR=$$WORKDIR: $$1" >&2; exit 1; }; \
	run="$${WORKDIR%/}"; \
	if [ -L "$$run" ]; then refuse "it is a link; remove it by hand"; fi; \
	if [ -e "$$WORKDIR" ]; then \
	  run=$$(CDPATH= cd -P -- "$$WORKDIR" 2>/dev/null && pwd) || refuse "it is not a directory that can be entered"; \
	  case "$$(pwd -P)/" in "$${run%/}/"*) refuse "this repository is in it";; esac; \
	  case "$$HOME/" in "$${run%/}/"*) refuse "the home directory is in it";; esac; \
	  if ! rmdir -- "$$run" 2>/dev/null; then \
	    grep -q '"method"' "$$run/config.json" 2>/dev/null || refuse "it holds no config.json of a run"; \
	    echo "Removing $$WORKDIR ..." && rm -rf -- "$$run"; \
	  fi; \
	fi
endif
