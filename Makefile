# `make train` runs the main job, `make test` the whole suite. Both make .venv
# first. `make gpu-check` tests and times the kernels on the GPU at hand, with the
# jax that PYTHON has. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN = .venv/bin
CONFIG ?= configs/spark_tiny.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))

# -P: not the folder at hand, where sparse_lm lacks kernels and configs.
GPU_PYTHON = PYTHONPATH=$(CURDIR)/.gpu-check $(PYTHON) -P

.PHONY: train test gpu-check gpu-install gpu-test gpu-benchmark clean
# What is timed runs alone.
.NOTPARALLEL:

train: .venv/installed
	$(BIN)/python -m sparse_lm.train --config=$(CONFIG) --workdir=$(WORKDIR)

test: .venv/installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Installed without dependencies, so that an image's own jax is used and data
# libraries are not needed.
gpu-check: gpu-test gpu-benchmark

gpu-install:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --no-index \
	  --upgrade --target .gpu-check .

gpu-test: gpu-install
	$(GPU_PYTHON) -m pytest --noconftest -q tests/gpu

gpu-benchmark: gpu-install
	for suite in ffn relu_ffn; do \
	  $(GPU_PYTHON) -m sparse_lm.benchmark --suite=$$suite --layers=26 || exit 1; done
	for suite in topk_training attention_training; do \
	  $(GPU_PYTHON) -m sparse_lm.benchmark --suite=$$suite || exit 1; done
	$(GPU_PYTHON) -m sparse_lm.benchmark --suite=decode --layers=26 \
	  --prompts=256,1024,4096

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
	rm -rf .venv .gpu-check build *.egg-info
