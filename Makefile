# Each target sets up its own environment in .venv first, on a fresh machine too.

PYTHON ?= python3
# The build that demo, test and CI install; an installed package asks for torch>=2.10 only.
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: demo demo-serve test lint bench clean

demo: .venv/installed
	$(BIN)/dac-fast reconstruct dac_fast/assets/tabla_cc0.flac --output demo --plot --existing overwrite
	@echo "listen to demo/tabla_cc0.wav, look at demo/tabla_cc0.png"

demo-serve: .venv/installed
	$(BIN)/dac-fast serve

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench run

clean:
	rm -rf .venv build demo *.egg-info

# Everything is reinstalled when what is installed changes.
.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
