# Two commands set everything up: `make demo` and `make test`. Python 3.10 to 3.13; nothing outside .venv and the cache is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types bench docs clean help

help:
	@echo "make demo    set up and train MIFO on the embedded model (about 10 minutes on 2 cores)"
	@echo "make test    set up and run the tests"
	@echo "make lint    ruff;  make types  mypy on core and config;  make bench  all benchmarks"

# The virtual environment is made anew when the pinned versions or the package's metadata change. Every file that is installed
# has its hash in requirements/; the build backend is one of them, so nothing else is fetched to build the package itself.
LOCKED := -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r
ASKS_FOR_CUDA := import importlib.metadata as m; print(any("nvidia" in r or "cuda" in r for r in m.requires("torch") or ()))

$(VENV)/.installed: requirements/cpu.txt requirements/cuda.txt requirements/torch-cpu.txt pyproject.toml
	@echo "installing into $(VENV): a few minutes, some hundred megabytes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(LOCKED) requirements/torch-cpu.txt --no-index 2>/dev/null || echo "no CPU build of torch at hand; taking the index's"
	$(BIN)/python $(LOCKED) requirements/cpu.txt
	if [ "$$($(BIN)/python -c '$(ASKS_FOR_CUDA)')" = True ]; then $(BIN)/python $(LOCKED) requirements/cuda.txt; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/mifo train smollm2-arithmetic --run.name demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

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
