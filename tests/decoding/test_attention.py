"""Attention laid out for decoding: it skips keys, and changes nothing."""

import dataclasses
from unittest import mock

from flax import nnx
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from recorder import Recorder

from sparse_lm.config import AttentionConfig, FFNConfig, ModelConfig
from sparse_lm.decoding import Decoder, attention
from sparse_lm.decoding.attention import (CachedAttention, SplitCache,
                                          choose_attention, decoding_cache)
from sparse_lm.kernels import token_attention
from sparse_lm.model import Transformer
from sparse_lm.model.cache import LayerCache

CONFIG = ModelConfig(
    vocab_size=50, context_length=4096, num_layers=2, model_dim=32,
    ffn=FFNConfig(num_neurons=64, predictor_dim=16, active_fraction=0.1),
    attention=AttentionConfig(num_query_heads=4, num_kv_heads=2, head_dim=8,
                              predictor_dim=4, top_k=12, sliding_window=40,
                              logit_softcap=5.0))
LENGTH, SLOTS = 120, 2048
EVERYTHING = 2**30


@pytest.mark.parametrize("window", [40, EVERYTHING])
def test_token_by_token_equals_the_forward_pass(window):
  """Rows at different positions of their own texts, after a prompt."""
  model = Transformer(CONFIG, nnx.Rngs(0))
  layer = next(model.layers()).attention
  x = jax.random.normal(jax.random.key(1), (3, LENGTH, 32))
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (3, LENGTH))
  whole, attended, seen, _ = layer(x, positions, None, window, None)
  graph, params = nnx.split(CachedAttention(layer))

  @jax.jit
  def advance(params, x, positions, cache):
    return nnx.merge(graph, params)(x, positions, None, window, cache)

  cache = decoding_cache(CONFIG, 3, 200, jnp.float32, "xla")[0]
  assert isinstance(cache, SplitCache)
  starts, rows = np.array([60, 1, 33]), np.arange(3)
  _, _, _, cache = advance(params, x[:, :60], positions[:, :60], cache)
  for i in range(30):
    now = (rows, starts + i)
    y, kept, visible, cache = advance(params, x[now][:, None],
                                      positions[now][:, None], cache)
    np.testing.assert_allclose(y[:, 0], whole[now], atol=2e-6)
    np.testing.assert_allclose(kept[:, 0], attended[now])
    np.testing.assert_array_equal(visible[:, 0], seen[now])


def test_skipping_changes_nothing(monkeypatch):
  """As chosen by itself, with enough room in the cache."""
  kernel = mock.Mock(wraps=attention.sparse_attention)
  monkeypatch.setattr(attention, "sparse_attention", kernel)
  config = dataclasses.replace(CONFIG, num_layers=1)
  params = nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(0))))
  prompts = [list(range(1, 50)) * 22, [9]]
  results = []
  for skip, expected in ((True, "xla"), (False, "dense")):
    decoder = Decoder(config, params, skip_inactive=skip)
    recorder = Recorder()
    drawn = decoder.generate(prompts, 1100, recorder, jax.random.key(0))
    for _ in range(24):
      next(drawn)
    results.append(recorder.logits_TxBxV)
    assert decoder.attention_implementations == [expected]
    # Of one step, which is compiled once; the prompt reads all keys.
    assert kernel.call_count == 1
  np.testing.assert_allclose(*results, atol=2e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 12),
                    reason="needs GPU interpret mode, of jax 0.12")
@pytest.mark.parametrize("shape", ["spark", "dense"])
def test_the_gpu_kernels_are_the_models_attention(shape):
  """One token a row, after another that the same cache holds."""
  config = dataclasses.replace(CONFIG, attention=AttentionConfig(
      shape=shape, num_query_heads=2, num_kv_heads=1, head_dim=256,
      predictor_dim=128, top_k=4, logit_softcap=5.0))
  layer = next(Transformer(config, nnx.Rngs(0)).layers()).attention
  graph, params = nnx.split(CachedAttention(layer))
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  x = jax.random.normal(jax.random.key(1), (2, 1, 32), jnp.bfloat16)
  positions = jnp.array([[40], [3]])

  def advance(cache, window=30):
    attention = nnx.merge(graph, params)
    # What was written earlier.
    rows = jax.random.normal(jax.random.key(2), (2, 64, 2, 256), jnp.bfloat16)
    cache = cache.write(rows[:, :, :1], rows[:, :, 1:],
                        jnp.broadcast_to(jnp.arange(64), (2, 64)))
    return attention(x, positions, None, window, cache)

  caches = [decoding_cache(config, 2, 64, jnp.bfloat16, name)[0]
            for name in ("pallas_gpu", "dense")]
  # More than eight of a cluster's warpgroups at a time are unknown there.
  with (plgpu.force_gpu_interpret_mode(),
        mock.patch.object(token_attention, "PARTS", 2)):
    y, *counts, cache = advance(caches[0])
  expected, *same, whole = advance(caches[1])
  error = np.linalg.norm(np.asarray(y - expected, np.float64))
  assert error < 2e-2 * np.linalg.norm(np.asarray(expected, np.float64))
  for a, b in zip(counts, same):
    np.testing.assert_array_equal(a, b)
  assert isinstance(cache, type(caches[0]))
  for name in ("key_BxKxSxE", "value_BxKxSxE"):
    np.testing.assert_array_equal(getattr(cache, name), getattr(whole, name))


def test_what_is_chosen():
  def chosen(config, slots):
    return choose_attention(config, 3, slots, jnp.float32)

  assert chosen(CONFIG.attention, SLOTS) == "xla"
  assert chosen(CONFIG.attention, SLOTS // 2) == "dense"
  dense = dataclasses.replace(CONFIG.attention, shape="dense")
  assert chosen(dense, SLOTS) == "dense"


def test_the_cache_keeps_its_type_and_size():
  split, = decoding_cache(dataclasses.replace(CONFIG, num_layers=1), 3, 16,
                          jnp.bfloat16, "xla")
  dense, = decoding_cache(dataclasses.replace(CONFIG, num_layers=1), 3, 16,
                          jnp.bfloat16, "dense")
  assert isinstance(dense, LayerCache)
  for cache in (split, dense):
    assert cache.slots == 16
    assert cache.key_BxKxSxE.shape == cache.value_BxKxSxE.shape == (3, 2, 16, 8)
    assert cache.key_BxKxSxE.dtype == jnp.bfloat16
  keys = jnp.arange(3 * 2 * 2 * 8.).reshape(3, 2, 2, 8)
  positions = jnp.array([[0, 1], [7, 8], [15, 16]])  # The last one is dropped.
  written = [cache.write(keys, -keys, positions) for cache in (split, dense)]
  for name in ("key_BxKxSxE", "value_BxKxSxE"):
    np.testing.assert_array_equal(*(getattr(cache, name) for cache in written))
