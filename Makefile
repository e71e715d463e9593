# Each target sets up its own environment in .venv first, on a fresh machine too.

PYTHON ?= python3
# The build that demo, test and CI install; an installed package asks for torch>=2.10 only.
TORCH ?= torch==2.13.0
# What wheels are built for, and which versions of PyTorch each is tried with: gigabytes of downloads.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
TORCHES ?= 2.10.0 2.13.0
BIN = .venv/bin

.PHONY: demo demo-serve test faults lint docs wheels hub bench clean

demo: .venv/demo
	@$(BIN)/dac-fast reconstruct dac_fast/assets/tabla_cc0.flac --output demo \
		--codebooks 1,3,9 --plot --listen --existing overwrite
	@cp dac_fast/assets/tabla_cc0.flac demo/original.flac
	@echo "demo/tabla_cc0.html plays original and copies; the files themselves lie beside it:"
	@ls demo

demo-serve: .venv/installed
	$(BIN)/dac-fast serve

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Hours of fault trials; the tests run a few thousand of them.
faults: .venv/installed
	FAULT_TRIALS=100000 $(BIN)/python -m pytest tests/faults

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The site is build/site; a warning is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html is the documentation"

wheels: .venv/wheels
	$(BIN)/python release/wheels.py dist --pythons $(PYTHONS) --torch $(TORCHES)

# dac_kernels as a repository for Hugging Face's `kernels`.
hub: .venv/demo
	$(BIN)/python release/hub.py build/hub

bench: .venv/installed
	$(BIN)/python -m bench run

clean:
	rm -rf .venv build dist demo *.egg-info

# A newcomer's environment: the package and its pictures.
.venv/demo: pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Everything goes into .venv here, which make clean removes: 1.3 GB with a CPU build of"
	@echo "PyTorch, several GB with a CUDA build. pip takes what its index has; make demo TORCH=..."
	@echo "names another. It takes two minutes and more, by your network."
	@echo "1/3 making .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --upgrade pip
	@echo "2/3 installing PyTorch ($(TORCH)), most of the download"
	@$(BIN)/pip install --quiet "$(TORCH)"
	@echo "3/3 compiling csrc for this machine, installing dac_fast: under a minute"
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable ".[plot]"
	@touch $@

# A contributor's environment: what tests and linters use on top (Ray, transformers and others).
.venv/installed: .venv/demo
	@echo "installing what the tests use: a minute or more, by your network"
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

.venv/docs: .venv/demo
	@echo "installing what the documentation site is made with"
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable ".[docs]"
	@touch $@

.venv/wheels: .venv/demo
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable ".[wheels]"
	@touch $@
