# `make demo` and `make test` each work as the first command in a fresh clone: they create .venv and install into it.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin

# Tests run in a process more than there are processors, as some wait for the servers that they start; in four at most, as
# one may take 3 GB with its servers. One after the other: make TEST_PROCESSES=0 test
TEST_PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(min((os.cpu_count() or 1) + 1, 4))')
# A file's tests stay together and share what it sets up; tests/conftest.py says which files begin. A process that shares
# the processors computes with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) \
  --dist=loadfile --no-loadscope-reorder

# Each stamp says that .venv holds what the pyproject.toml of that moment asks for.
RUNTIME := .venv/.runtime-installed
DEV := .venv/.dev-installed

.PHONY: demo test test-all lint bench services clean
.NOTPARALLEL:

demo: $(RUNTIME)
	@$(BIN)/dino-search demo

test: $(DEV)
	@$(PYTEST) -m "not slow"

test-all: $(DEV)
	@$(PYTEST)

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(DEV)
	@set -e; for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# The Milvus server that tests start where it is there, in an environment of its own.
services: | $(BIN)/python
	@[ -x .milvus/bin/milvus-server ] || { $(PYTHON) -m venv .milvus && \
	  .milvus/bin/python -m pip install --quiet --disable-pip-version-check --no-deps milvus==2.3.5 'setuptools<81'; }

clean:
	rm -rf .venv .milvus build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find dino_search training index tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || { \
	  echo "dino-search needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

$(RUNTIME): pyproject.toml | $(BIN)/python
	$(call install,.)
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(call install,.[dev])
	@touch $(RUNTIME) $@

define install
@echo "Installing $(1) into .venv; the first time takes minutes (about 7.5 GB on Linux x86_64) ..."
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(1)'
endef
