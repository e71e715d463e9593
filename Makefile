# Each target sets up its own environment in .venv first, on a fresh machine too.

PYTHON ?= python3
# The build that demo, test and CI install; an installed package asks for torch>=2.10 only.
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/demo
	$(BIN)/dac-fast reconstruct dac_fast/assets/tabla_cc0.flac --output demo --plot --existing overwrite
	@echo "listen to demo/tabla_cc0.wav, look at demo/tabla_cc0.png"

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

# A newcomer's environment: the package and its pictures.
.venv/demo: pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Installing $(TORCH) and dac_fast into .venv: a CPU build of PyTorch takes 200 MB, a minute or two."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	@echo "Compiling the extension, and for the GPUs of this machine its CUDA half."
	$(BIN)/pip install --quiet --editable ".[plot]"
	touch $@

# A contributor's environment, with everything that tests use. It is made again when that changes.
.venv/installed: .venv/demo
	@echo "Installing what the tests use (Ray, transformers, ONNX Runtime and others)."
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
