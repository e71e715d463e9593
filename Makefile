# Each target sets up its own environment in .venv first, on a fresh machine too.

PYTHON ?= python3
# The build that demo, test and CI install; an installed package asks for torch>=2.10 only.
TORCH ?= torch==2.13.0
# Without an NVIDIA GPU its build for the CPU is enough, which PyTorch's own index has.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_INDEX ?= --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
TORCH_BUILD = CPU build, about 200 MB
else
TORCH_BUILD = CUDA build, some GB
endif
BIN = .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/installed
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

# Everything is reinstalled when what is installed changes.
.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	@echo "1/3 making .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --upgrade pip
	@echo "2/3 installing PyTorch ($(TORCH_BUILD)): a minute or more, by your network"
	@$(BIN)/pip install -qq $(TORCH_INDEX) "$(TORCH)"
	@echo "3/3 compiling csrc for this machine, installing dac_fast and its tools: about as long"
	@$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@
