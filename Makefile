# Each target makes its own virtual environment, so each works alone on a fresh clone.
#   make demo       a comparison of ADVI, the flow and NUTS
#   make test       the tests without the slow ones: at most 10 minutes on 2 cores
#   make test-fast  the tests that fit no flow: at most 2 minutes
#   make test-all   every test, and the examples in the docstrings
#   make lint       style and types
PYTHON ?= python3
BIN := .venv/bin
# Workers are processes; threads of linear algebra beside them would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-fast test-all lint

demo: .venv/demo.installed
	$(BIN)/python -m benchmarks.demo

test: .venv/test.installed
	$(PYTEST) -m "not slow"

test-fast: .venv/test.installed
	$(PYTEST) -m "not slow and not fit"

test-all: .venv/test.installed
	$(PYTEST)
	$(PYTEST) --doctest-modules pymc_flows

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/%.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$(if $(filter demo,$*),jax$(comma)plots,test)]"
	touch $@

comma := ,
