# One command per job. `make ARGS="..."` passes more arguments to the program behind the target.
SHELL := /bin/bash
PYTHON_BIN := .venv/bin/python
MYPY_ROOMS := stare_jax/episode.py stare_jax/stages.py stare_jax/batching.py stare_jax/dataset.py stare_jax/config.py \
  stare_jax/evaluate.py stare_jax/tasks stare_jax/losses launch/rendering.py

.DEFAULT_GOAL := help
.PHONY: help setup tpu-compiler gpu-compiler run smoke test test-slow lint types clean

help:       ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */make \1\t/' | expand -t 18

setup:      ## .venv and rendering; fast when there is nothing to do
	@bash launch/setup.sh

tpu-compiler: setup ## the TPU's compiler, for python -m stare_jax.compile and its tests (700 MB; needs no TPU)
	@test -e .venv/tpu-compiler/libtpu/libtpu.so || \
	  .venv/bin/pip install -qq --no-deps --target .venv/tpu-compiler -r requirements-tpu.txt

gpu-compiler: setup ## XLA for NVIDIA GPUs, for python -m stare_jax.compile (400 MB; needs no GPU)
	@test -e .venv/gpu-compiler/jax_plugins || \
	  .venv/bin/pip install -qq --no-deps --target .venv/gpu-compiler -r requirements-gpu.txt

run: setup  ## the main job: Imitation, Preference, Interaction; leaves a run folder under runs/
	$(PYTHON_BIN) -m stare_jax.main --config=configs/ipi.py $(ARGS)

smoke: setup ## the main job in minutes: every phase for real, too short to learn
	$(PYTHON_BIN) -m stare_jax.main --config=configs/ipi.py:smoke $(ARGS)

test: setup tpu-compiler lint types ## set up, lint, type-check and pass the tests (the smoke run included)
	$(PYTHON_BIN) -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup ## what `make test` leaves out because it takes long
	$(PYTHON_BIN) -m pytest -m "slow and not gpu" $(ARGS)

lint: setup ## ruff
	$(PYTHON_BIN) -m ruff check .

types: setup ## mypy on the rooms that are plain numpy and plain Python
	$(PYTHON_BIN) -m mypy $(MYPY_ROOMS)

clean:      ## caches; keeps .venv and runs/
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
