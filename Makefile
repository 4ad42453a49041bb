# `make train` runs the main job, `make test` the whole suite. Both make .venv
# first. PYTHON picks the interpreter (3.11 or newer) the first time.
PYTHON ?= python3
BIN = .venv/bin
CONFIG ?= configs/spark_tiny.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))

.PHONY: train test clean

train: .venv/installed
	$(BIN)/python -m sparse_lm.train --config=$(CONFIG) --workdir=$(WORKDIR)

test: .venv/installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: sparse-lm needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: .venv/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	# Apart from the environment: where it can be imported, jax tries to be a TPU.
	$(BIN)/python -m pip install --quiet --target .venv/libtpu libtpu || \
	  echo 'no libtpu for this machine: the TPU compile test will be skipped'
	touch $@

clean:
	rm -rf .venv build *.egg-info
