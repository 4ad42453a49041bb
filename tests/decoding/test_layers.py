"""Layers laid out for decoding: they skip, and change nothing."""

import dataclasses
import gc
import weakref

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorder import Recorder

from sparse_lm.config import (AttentionConfig, FFNConfig, LinearInputsConfig,
                              ModelConfig)
from sparse_lm.decoding import Decoder
from sparse_lm.decoding.layers import NeuronMajorFFN, make_select
from sparse_lm.model import Transformer
from sparse_lm.model.ffn import FFN

CONFIG = ModelConfig(
    vocab_size=50, context_length=48, num_layers=2, model_dim=32,
    ffn=FFNConfig(num_neurons=64, predictor_dim=16, active_fraction=0.1),
    attention=AttentionConfig(shape="dense", num_query_heads=4, num_kv_heads=2,
                              head_dim=8))
GATED = {"shape": "gated", "num_neurons": 64}
FFNS = {
    "spark": CONFIG.ffn,
    "reglu": FFNConfig(**GATED, sparsifier="none", activation="relu"),
    "drelu": FFNConfig(**GATED, sparsifier="none", activation="relu",
                       up_activation="relu"),
    "plain": FFNConfig(shape="plain", num_neurons=64, sparsifier="none",
                       activation="relu2"),
    "gemma3n": FFNConfig(**GATED, active_fraction=0.1, sparse_layers="0"),
    "moc": FFNConfig(**GATED, sparsifier="block_topk", active_fraction=0.125,
                     activation="silu"),
    "fatrelu": FFNConfig(**GATED, sparsifier="none", activation="fatrelu",
                         threshold=0.1),
    "geglu": FFNConfig(**GATED, sparsifier="none"),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(10, 31))]  # ragged


def params_of(config):
  return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(0))))


def record(decoder, prompts, steps=12):
  """The logits of each step."""
  recorder = Recorder()
  list(decoder.generate(prompts, steps, recorder, jax.random.key(0)))
  return recorder.logits_TxBxV


@pytest.mark.parametrize("name, expected", [
    ("spark", ["xla", "xla"]), ("reglu", ["xla", "xla"]),
    ("drelu", ["xla", "xla"]), ("plain", ["xla", "xla"]),
    ("moc", ["xla", "xla"]), ("gemma3n", ["xla", "dense"]),
    ("fatrelu", ["xla", "xla"]), ("geglu", ["dense", "dense"])])
def test_skipping_changes_nothing(name, expected):
  config = dataclasses.replace(CONFIG, ffn=FFNS[name])
  params = params_of(config)
  logits, sparsity = [], []
  for skip in (True, False):
    decoder = Decoder(config, params, skip_inactive=skip)
    logits.append(record(decoder, PROMPTS))
    sparsity.append(decoder.sparsity())
    assert decoder.ffn_implementations == (expected if skip
                                           else ["dense", "dense"])
  np.testing.assert_allclose(*logits, atol=2e-5)
  assert sparsity[0] == pytest.approx(sparsity[1], rel=1e-3)


@pytest.mark.parametrize("name", FFNS)
def test_a_decoder_reads_the_rows_of_active_neurons_alone(name):
  """Of neurons that never fire the other rows are NaN, and nobody sees it.

  Prompts are fed token by token as well: more at a time read everything.
  """
  config = dataclasses.replace(CONFIG, ffn=FFNS[name])
  params = params_of(config)
  # Their scores are 0, which no threshold here lets pass. Few fire, too: of
  # many, all rows are read.
  silent_F = np.arange(64) >= 16
  ffn = params["blocks"]["ffn"]
  ffn["gate_DxF"] = jnp.where(silent_F, 0, ffn["gate_DxF"])
  poisoned = jax.tree.map(lambda x: x, params)
  ffn = poisoned["blocks"]["ffn"]
  ffn["down_FxD"] = jnp.where(silent_F[:, None], jnp.nan, ffn["down_FxD"])
  if "up_DxF" in ffn:
    ffn["up_DxF"] = jnp.where(silent_F, jnp.nan, ffn["up_DxF"])
  expected, logits = (record(Decoder(config, p, prefill_chunk=1),
                             [[3, 1, 4, 1, 5]]) for p in (params, poisoned))
  assert np.isfinite(expected).all()
  if name in ("geglu", "gemma3n"):  # All layers compute all, and the second.
    assert np.isnan(logits).all()
  else:
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("name", FFNS)
def test_a_selection_does_not_hold_the_layer(name):
  """Whose parameters have been laid out anew."""
  ffn = FFN(FFNS[name], LinearInputsConfig(), 32, nnx.Rngs(1))
  select, layer = make_select(ffn, True), weakref.ref(ffn)
  del ffn
  gc.collect()
  assert select is not None and layer() is None


def test_sparse_inputs_are_computed_whole():
  config = dataclasses.replace(
      CONFIG, ffn=FFNS["reglu"],
      linear_inputs=LinearInputsConfig(sparsifier="topk"))
  decoder = Decoder(config, params_of(config))
  record(decoder, PROMPTS, 2)
  assert decoder.ffn_implementations == ["dense", "dense"]


@pytest.mark.parametrize("name", ["spark", "reglu", "drelu", "plain", "moc",
                                  "fatrelu"])
def test_one_token_reads_the_rows_of_active_neurons_alone(name):
  """NaN in all other rows does not show; with many tokens it does."""
  ffn = FFN(FFNS[name], LinearInputsConfig(), 32, nnx.Rngs(1))
  x = jax.random.normal(jax.random.key(2), (1, 1, 32))
  expected, activity = ffn(x)
  if name in ("reglu", "drelu", "plain", "fatrelu"):
    # Half are active, too many to be streamed: move all scores down alike.
    high = jnp.quantile(activity.gate_BxLxF, 0.85)
    ffn.gate_DxF[...] -= high * x[0, 0][:, None] / jnp.square(x).sum()
    expected, activity = ffn(x)
  idle_F = activity.activation_BxLxF[0, 0] == 0
  assert 48 < idle_F.sum() < 64
  layer = NeuronMajorFFN(ffn, True, "xla")
  for weights in ("up_FxD", "down_FxD"):
    if hasattr(layer, weights):
      rows = getattr(layer, weights)
      rows[...] = jnp.where(idle_F[:, None], jnp.nan, rows[...])
  y, count = layer(x)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  assert count.active_BxL[0, 0] == 64 - idle_F.sum()
  assert np.isnan(layer(jnp.repeat(x, 2, axis=1))[0]).all()
