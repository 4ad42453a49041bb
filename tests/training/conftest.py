"""Training steps on made-up batches, on any number of devices."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm.config import TrainingConfig
from sparse_lm.model.attention import layer_windows
from sparse_lm.model.transformer import Layer, model_graph
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


@functools.partial(jax.jit, static_argnums=0)
def _ffn_inputs(config, params, batch):
  """What enters each layer's FFN (N, B, L, D), through the model's parts."""
  model = nnx.merge(model_graph(config), params)
  positions, segments = batch["positions_BxL"], batch["segment_ids_BxL"]
  x = params["embedding_VxD"][batch["tokens_BxL"]] * config.model_dim**0.5
  windows = layer_windows(config.attention, config.num_layers)
  inputs = []
  for block, window in zip(model.layers(), windows):
    y = block.attention(block.attention_norm(x), positions, segments, window,
                        None)[0]
    inputs.append(block.ffn_norm(x + block.attention_out_norm(y)))
    x = block(x, Layer(window, True), positions, segments, None, ())[0]
  return jnp.stack(inputs)


def _in_float64(config, params, batch):
  """Inputs x, gate g, up u of each layer's neurons, and the tokens' mask."""
  ffn = params["blocks"]["ffn"]
  x, gate, up = (np.asarray(a, np.float64) for a in (
      _ffn_inputs(config.model, params, batch), ffn["gate_DxF"], ffn["up_DxF"]))
  return (x, np.einsum("nbld,ndf->nblf", x, gate),
          np.einsum("nbld,ndf->nblf", x, up), batch["segment_ids_BxL"] > 0)


def _assert_same_step(ours, reference, tolerance=2e-5):
  """Parameters after SGD, hence gradients; what was measured; what is kept."""
  for a, b in zip(ours, reference, strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(
        x, y, atol=tolerance, rtol=tolerance), a, b)


@pytest.fixture(scope="session")
def make_batch():
  return _make_batch


@pytest.fixture(scope="session")
def take_step():
  return _take_step


@pytest.fixture(scope="session")
def initial_params():
  return _initial_params


@pytest.fixture(scope="session")
def in_float64():
  return _in_float64


@pytest.fixture(scope="session")
def assert_same_step():
  return _assert_same_step


@pytest.fixture(scope="session")
def relu_config(tiny_config):
  """Tiny with a gated ReLU FFN, its vocabulary such that devices split it.

  Keys are changed as by `tiny_config`; groups of `training` by their names,
  as in `relu_config(penalty={"factor": 0.1})`.
  """
  keys = {"model.vocab_size": 264, "model.ffn.shape": "gated",
          "model.ffn.activation": "relu", "model.ffn.sparsifier": "none",
          "model.attention.shape": "dense"}

  def make(penalty=(), dead_neurons=(), mesh=(), **changes):
    groups = dict(penalty=penalty, dead_neurons=dead_neurons, mesh=mesh)
    changes |= {f"training.{group}.{key}": value
                for group, values in groups.items()
                for key, value in dict(values).items()}
    return tiny_config(**{**keys, **changes})

  return make
