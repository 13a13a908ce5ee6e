# `make demo` and `make test` start from nothing: they make .venv and install pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test all-tests proof check lint types imports browser clean

demo: $(INSTALLED)
	$(BIN)/onnxpress run recipes/minilm.yaml -o demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --dist worksteal -m "not exhaustive"

check: lint types imports all-tests

all-tests: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --dist worksteal

proof: $(INSTALLED)
	$(BIN)/python -m pytest -m quiet tests/benchmarks/test_proof.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
