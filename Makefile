# make demo   a model with real weights, made faster, with the evidence
# make test   everything that CI checks
# make help   the rest
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,demo,serve
DEMO_OUT ?= out/minilm
SAMPLE ?=
TPU_ARGS ?=

.PHONY: help setup check test test-tpu demo breadth faults bench docs clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 to 3.13 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[$(EXTRAS)]' -c constraints.txt
	@# Its pins are older than ours, and only its analysis (numpy, scipy) is used: no dependencies.
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps apache-otava==0.8.0
	@touch $@

setup: $(STAMP)  ## virtual environment with everything; quick when nothing changed

check: setup  ## lint, types and layers, without running anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; $(BIN)/lint-imports && wait $$types

test: check  ## check, then every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not serial" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m serial $(PYTEST_ARGS)

test-tpu:  ## device tests on TorchTPU and PyTorch/XLA: on a TPU, else emulated (TPU_ARGS=--short for the first alone)
	PIP_ARGS="$(PIP_ARGS)" $(PYTHON) tests/tpu/run.py $(TPU_ARGS)

demo: setup  ## optimise all-MiniLM-L6-v2 and write the report
	$(BIN)/kpt optimize examples/minilm.py:workload -o $(DEMO_OUT)

breadth: setup  ## every architecture of the breadth suite (SAMPLE=N for a rotating sample)
	$(BIN)/python benchmarks/breadth.py $(if $(SAMPLE),--sample $(SAMPLE))

faults: setup  ## the seeded faults that the validator must reject
	$(BIN)/python benchmarks/faults.py

bench: setup  ## measure the examples and store the artefacts under benchmarks/results
	$(BIN)/python benchmarks/examples.py

docs: setup  ## regenerate the pages that come from the code
	$(BIN)/python docs/generate.py

clean:  ## remove what can be made again, the virtual environment included
	rm -rf $(VENV) .venv-tpu .venv-xla out build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
