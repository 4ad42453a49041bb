"""Attention against formulas in float64, masks by gradients."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sparse_lm.config import AttentionConfig, LinearInputsConfig
from sparse_lm.model.attention import (Attention, layer_windows, spark_weights,
                                       visible)

D, L = 24, 20
CONFIG = AttentionConfig(shape="spark", num_query_heads=4, num_kv_heads=2,
                         head_dim=8, predictor_dim=4, top_k=L)
EVERYTHING = 2**30


def run(config, x, segments=None, window=EVERYTHING):
  layer = Attention(config, LinearInputsConfig(), D, nnx.Rngs(0))
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  graph, params = nnx.split(layer)

  @jax.jit
  def call(params, x):
    return nnx.merge(graph, params)(x, positions, segments, window, None)

  y, attended, seen, _ = call(params, x)
  return layer, y, attended, seen


def inputs():
  return jax.random.normal(jax.random.key(3), (2, L, D))


def rope64(x, base):
  """Each pair (i, i + n/2) turned by position * base^(-2i/n)."""
  half = x.shape[-1] // 2
  angle = np.arange(L)[:, None] * base ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
  return np.concatenate([turned.real, turned.imag], -1)


def formula(layer, x, config, keep):
  """Attention in float64 by loops over rows, heads and queries.

  `keep(scores)` says which of the visible keys have weight.
  """
  w = {k: np.asarray(v, np.float64)
       for k, v in nnx.to_pure_dict(nnx.state(layer)).items()}
  x = np.asarray(x, np.float64)
  spark = config.shape == "spark"
  split = [config.predictor_dim] if spark else []
  group = config.num_query_heads // config.num_kv_heads

  def cap(s):
    c = config.logit_softcap
    return c * np.tanh(s / c) if c else s

  y = np.zeros_like(x)
  for b, row in enumerate(x):
    q, k, v = (np.einsum("ld,dhe->lhe", row, w[n]) for n in
               ("query_DxHxE", "key_DxKxE", "value_DxKxE"))
    q, k = (np.concatenate([rope64(p, config.rope_base)
                            for p in np.split(a, split, -1)], -1)
            for a in (q, k))
    for h in range(config.num_query_heads):
      for i in range(L):
        first = split[0] if spark else config.head_dim
        keys = k[:i + 1, h // group]
        scores = keys[:, :first] @ q[i, h, :first] / np.sqrt(first)
        kept = keep(scores)
        weights = np.where(kept, np.exp(cap(scores)), 0)
        weights /= weights.sum()
        if spark:
          rest = keys[:, first:] @ q[i, h, first:] / np.sqrt(
              config.head_dim - first)
          weights *= np.log1p(np.exp(rest))
        y[b, i] += (weights @ v[:i + 1, h // group]) @ w["output_HxExD"][h]
  return y


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("shape", ["dense", "spark"])
def test_all_keys_kept(shape, softcap):
  """For Spark, k at least the length: softmax times softplus."""
  config = dataclasses.replace(CONFIG, shape=shape, logit_softcap=softcap)
  x = inputs()
  layer, y, attended, seen = run(config, x)
  np.testing.assert_allclose(
      y, formula(layer, x, config, lambda s: np.ones(len(s), bool)), atol=2e-5)
  np.testing.assert_array_equal(seen, [np.arange(1, L + 1)] * 2)
  np.testing.assert_array_equal(attended, seen)


def test_spark_keeps_the_keys_above_the_threshold_of_the_visible():
  config = dataclasses.replace(CONFIG, top_k=5, logit_softcap=2.0)

  def keep(scores):
    if len(scores) <= 5:
      return np.ones(len(scores), bool)
    theta = scores.mean() + scores.std() * scipy.stats.norm.ppf(
        1 - 5 / len(scores))
    return scores >= min(theta, scores.max())

  x = inputs()
  layer, y, attended, seen = run(config, x)
  np.testing.assert_allclose(y, formula(layer, x, config, keep), atol=2e-5)
  assert np.all(np.asarray(attended) <= np.asarray(seen))
  assert 2 < np.asarray(attended)[:, 10:].mean() < 7


def test_no_query_is_left_without_a_key():
  """One far outlier below: the threshold can exceed every score."""
  key = np.zeros((1, 1, 64, 8), np.float32)
  key[0, 0, 0] = -100
  query = np.ones((1, 1, 1, 1, 8), np.float32)
  config = dataclasses.replace(CONFIG, top_k=1)
  weights, kept = spark_weights(query, key, np.ones((1, 1, 64), bool), config)
  assert kept.sum() >= 1
  assert np.all(np.isfinite(weights)) and weights.sum() > 0


def test_a_key_below_the_threshold_has_no_influence():
  config = dataclasses.replace(CONFIG, top_k=3)
  rng = np.random.default_rng(0)
  query = rng.normal(size=(1, 1, 1, 1, 8)).astype(np.float32)
  key = rng.normal(size=(1, 1, 30, 8)).astype(np.float32)
  seen = np.ones((1, 1, 30), bool)
  weights, kept = spark_weights(query, key, seen, config)
  np.testing.assert_array_equal(weights > 0, kept)


def test_causal_by_gradients():
  for shape in ("dense", "spark"):
    config = dataclasses.replace(CONFIG, shape=shape, top_k=6)
    jacobian = jax.jit(jax.jacobian(
        lambda x, c=config: run(c, x)[1][0].sum(-1)))(inputs())[:, 0]
    influence = np.abs(jacobian).sum(-1)  # (query, key)
    assert np.all(influence[np.triu_indices(L, 1)] == 0)
    assert np.all(np.diag(influence) > 0)


def test_no_leak_across_documents_or_the_window():
  segments = jnp.array([[1] * 7 + [2] * 8 + [3] * 5] * 2)
  for window in (EVERYTHING, 4):
    jacobian = jax.jit(jax.jacobian(
        lambda x, w=window: run(CONFIG, x, segments, w)[1][0].sum(-1)))(
            inputs())[:, 0]
    influence = np.abs(jacobian).sum(-1)
    queries, keys = np.indices((L, L))
    ids = np.asarray(segments[0])
    allowed = ((ids[queries] == ids[keys]) & (queries >= keys)
               & (queries - keys < window))
    assert np.all(influence[~allowed] == 0)
    assert np.all(influence[allowed] > 0)


def test_visible_counts_positions_within_documents():
  positions = jnp.array([[0, 1, 2, 0, 1]])
  segments = jnp.array([[1, 1, 1, 2, 2]])
  seen = visible(positions, positions, segments, segments, 2)
  np.testing.assert_array_equal(seen.sum(-1), [[1, 2, 2, 1, 2]])


@pytest.mark.parametrize("shape, chunk", [("dense", 5), ("spark", 5),
                                          ("spark", 8)])
@pytest.mark.parametrize("segments", [None, "two"])
def test_chunks_of_queries_change_nothing(shape, chunk, segments):
  if segments:
    segments = jnp.array([[1] * 9 + [2] * 11] * 2)
  config = dataclasses.replace(CONFIG, shape=shape, top_k=5, logit_softcap=2.0)
  chunked = dataclasses.replace(config, query_chunk=chunk)

  def loss(x, config):
    _, y, attended, _ = run(config, x, segments, 12)
    return jnp.sum(y**2), (y, attended)

  grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
  (plain, aux), (in_chunks, chunked_aux) = (grad(inputs(), c)
                                            for c in (config, chunked))
  np.testing.assert_allclose(plain, in_chunks, atol=1e-4)
  for a, b in zip(aux, chunked_aux):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_layer_windows_alternate_as_in_gemma_2():
  config = dataclasses.replace(CONFIG, sliding_window=64, global_every=2)
  windows = layer_windows(config, 5)
  assert [w == 64 for w in windows] == [True, False, True, False, True]
  assert layer_windows(CONFIG, 2) == [EVERYTHING] * 2
