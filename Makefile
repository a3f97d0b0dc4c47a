# Set-up is two commands, each enough on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/demo.installed
	$(BIN)/python benchmarks/demo.py

test: .venv/test.installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

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
