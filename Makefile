# make demo   sets everything up, trains a small GLM on this machine's Python sources, completes a prompt
# make test   sets everything up, runs every check (lint, C++ tests, pytest under each instruction set, examples, demo)
# make wheel  writes dist/glmx-*.whl, for any x86-64 machine with this Python; no compiler is needed where it is installed
# make bench  a selection of the benchmarks, five minutes, one table
# make dev    the environment alone      make lint / clean
#
# All of it lives in .venv and build/: no root, and a second run installs and compiles nothing that has not changed.
# Variables: TORCH (what pip installs as torch), ARGS (passed on to glmx demo, or to the benchmarks), GLMX_PYTHON, CXX, MAX_JOBS,
# GLMX_CUDA (AUTO, ON, OFF: the CUDA backend), GLMX_STRICT=1 (a missing toolchain is a failure instead of a skip).
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTHON := $(shell sh cmake/toolchain.sh python)
MISSING := $(shell sh cmake/toolchain.sh check)
BUILD_REQUIRES = $(shell $(PYTHON) -c "import tomllib; print(*(repr(r) for r in tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires']))")
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt

export PATH := $(CURDIR)/$(BIN):$(PATH)
.NOTPARALLEL:
.PHONY: demo test wheel dev lint bench clean

ifneq ($(MISSING),)
demo test wheel dev lint bench:
	@echo "glmx: SKIPPED make $@: $(MISSING)"
	@test "$$GLMX_STRICT" != 1
else

demo: .venv/.built
	$(BIN)/glmx demo $(ARGS)

test: .venv/.test .venv/.built
	$(BIN)/python tests/run.py

wheel: .venv/.glmx
	rm -f dist/glmx-*.whl
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/glmx-*.whl

dev: .venv/.test .venv/.built
	@echo "ready: $(BIN)/python, $(BIN)/glmx; after a change in csrc/: make dev"

lint: .venv/.test
	$(BIN)/python tests/run.py lint

bench: .venv/.test .venv/.built
	$(BIN)/python -m pytest bench --quick --threads 1,$(shell nproc) $(ARGS)

endif

# Stamps: each is touched when its step is done, and is out of date when a file it names has changed.
.venv/.torch:
	@echo "== .venv: $(TORCH) and what a build needs"
	$(PYTHON) -m venv .venv
	$(PIP) install $(BUILD_REQUIRES) $(TORCH)
	@touch $@

.venv/.glmx: .venv/.torch pyproject.toml setup.py cmake/glmx_backend.py
	@echo "== .venv: glmx, in place"
	$(PIP) install --no-build-isolation --editable '.[train,serve]'
	@touch $@

.venv/.test: .venv/.glmx
	@echo "== .venv: what the tests need"
	$(PIP) install --no-build-isolation --editable '.[test]'
	@touch $@

.venv/.built: .venv/.glmx $(SOURCES)
	@echo "== libraries"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf build dist demo-out .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks .venv/.glmx .venv/.test .venv/.built
	rm -rf python/*.egg-info python/glmx/*.so
	find python tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
