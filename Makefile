# `make run` and `make test` do all their own set-up: Python 3.11 or later with pip is all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Files of published and measured figures that `make validate` holds the estimates against.
ROWS ?= ../shared/data/megatron_h200.jsonl ../shared/data/published_numbers.jsonl ../shared/data/launch_configs.jsonl

# Runs on real engines, whose plans were held against what the GPUs showed.
RUNS ?= $(wildcard benchmarks/results/engines_*.json)

.PHONY: run test lint format validate clean

$(VENV)/.installed: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e ".[run,dev]"
	touch $@

run: $(VENV)/.installed
	$(BIN)/miles-plan run specs/quickstart.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not gpu and not multi_gpu"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

validate: $(VENV)/.installed
	$(BIN)/miles-plan validate --out docs/accuracy.md $(addprefix --run ,$(RUNS)) $(ROWS)

clean:
	rm -rf $(VENV) runs build dist *.egg-info
