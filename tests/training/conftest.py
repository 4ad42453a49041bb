"""Training steps on made-up batches, on any number of devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm.config import TrainingConfig
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training import sparsity
from sparse_lm.training.step import (TrainState, init_params, init_state,
                                     make_train_step)

# With it, parameters before less parameters after are the gradient.
_SGD = optax.sgd(1.0)


def _make_batch(config, seed=0):
  """Packed rows with padding, so that token counts differ between rows.

  Not every token's prediction counts, so that predictions and tokens differ.
  """
  rng = np.random.default_rng(seed)
  rows, length = config.training.batch_size, config.model.context_length
  segments = np.zeros((rows, length), np.int32)
  for row in segments:
    cut, end = np.sort(rng.integers(4, length, 2))
    row[:cut], row[cut:end] = 1, 2
  start = np.where(segments == 2, (segments == 1).sum(1, keepdims=True), 0)
  tokens = rng.integers(0, config.model.vocab_size, (2, rows, length))
  counts = (segments > 0) & (rng.random((rows, length)) < 0.8)
  return dict(
      tokens_BxL=tokens[0].astype(np.int32),
      targets_BxL=tokens[1].astype(np.int32),
      weights_BxL=counts.astype(np.float32), segment_ids_BxL=segments,
      positions_BxL=(np.arange(length) - start).astype(np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config):
  return init_params(config)


def _initial_params(config):
  """Compiled once for each model and seed."""
  return _init_params(dataclasses.replace(config, training=TrainingConfig(
      seed=config.training.seed)))


def _initial_state(config, optimizer):
  params = _initial_params(config)
  return TrainState(jnp.int32(0), params, optimizer.init(params),
                    sparsity.init(config))


def _take_step(config, optimizer=_SGD, mesh=None, steps=1):
  """Parameters, metrics after some steps; `mesh=None`: on one device."""
  text_bytes_V = np.ones(config.model.vocab_size, np.float32)
  step = make_train_step(config, optimizer, optax.constant_schedule(1.0),
                         text_bytes_V)
  batch = _make_batch(config)
  if mesh is None:
    state, run = _initial_state(config, optimizer), jax.jit(step)
    for _ in range(steps):
      state, out = run(state, batch)
    return state, out
  create = functools.partial(init_state, config, optimizer)
  shardings = mesh_lib.shardings(mesh, jax.eval_shape(create))
  with jax.set_mesh(mesh):
    state = jax.jit(create, out_shardings=shardings)()
    run = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
    for _ in range(steps):
      state, out = run(state, mesh_lib.place_batch(mesh, batch))
  return state, out


@pytest.fixture(scope="session")
def make_batch():
  return _make_batch


@pytest.fixture(scope="session")
def take_step():
  return _take_step


@pytest.fixture(scope="session")
def initial_params():
  return _initial_params
