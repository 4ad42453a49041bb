"""The kernels on an NVIDIA GPU: `make gpu-check`, without tests/conftest.py."""

import functools
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorder import Recorder

from sparse_lm.config import AttentionConfig, FFNConfig, ModelConfig
from sparse_lm.decoding import Decoder
from sparse_lm.decoding import decoder as decoding
from sparse_lm.kernels import sparse_attention as attention
from sparse_lm.kernels.add_norm import add_norm, add_norm_and_project
from sparse_lm.kernels.dense_attention import write_and_attend
from sparse_lm.kernels.spark_attention import spark_attention
from sparse_lm.kernels.sparse_attention import sparse_attention
from sparse_lm.kernels.sparse_ffn import (Elementwise, StatisticalTopk,
                                          add_norm_and_sparse_ffn, sparse_ffn)
from sparse_lm.kernels.statistical_topk import gated_topk
from sparse_lm.model import Transformer

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu",
                                reason="needs an NVIDIA GPU: make gpu-check")

gelu = functools.partial(jax.nn.gelu, approximate=True)


def above(threshold, score):
  return jnp.where(score > threshold, score, 0)


SPARK = [(2304,), (13824, 1024), (13824, 1280), (13824, 2304)]
GATED = [(2304,), (9216, 2304), (9216, 2304), (9216, 2304)]
CASES = {
    "spark": (SPARK, StatisticalTopk(1.405, gelu)),
    "gated": (GATED, Elementwise(functools.partial(above, 2.3))),
    "plain": ([*GATED[:2], None, GATED[3]], Elementwise(jax.nn.relu)),
    "all": (SPARK, Elementwise(jnp.tanh)),
    "none": (SPARK, Elementwise(jnp.zeros_like)),
}


def make(shapes, tokens, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = [(tokens, *shapes[0]), *shapes[1:]]
  return [s and jax.random.normal(key, s, jnp.bfloat16) * (
      1 if s is shapes[0] else s[1]**-0.5) for key, s in zip(keys, shapes)]


def error(y, expected):
  y, expected = (np.asarray(a, np.float64) for a in (y, expected))
  return np.linalg.norm(y - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("case, tokens", [
    *itertools.product(CASES, [1, 8, 32]), ("spark", 3), ("gated", 20),
    ("spark", 9), ("spark", 64)])
def test_sparse_ffn(case, tokens):
  shapes, select = CASES[case]
  arrays = make(shapes, tokens, seed=tokens)
  run = functools.partial(sparse_ffn, select=select)
  y, active = jax.jit(functools.partial(
      run, implementation="pallas_gpu"))(*arrays)
  wide = [a if a is None else a.astype(jnp.float32) for a in arrays]
  with jax.default_matmul_precision("highest"):
    expected, count = jax.jit(functools.partial(
        run, implementation="reference"))(*wide)
  assert error(y, expected) < 5e-3
  # Scores are summed in another order: one may fall on the other side.
  assert np.abs(np.asarray(active) - np.asarray(count)).max() <= 2
  again, _ = jax.jit(functools.partial(
      run, implementation="pallas_gpu"))(*arrays)
  np.testing.assert_array_equal(y, again)


def test_what_runs_by_default_is_the_kernel():
  arrays = make(SPARK, 1)
  select = CASES["spark"][1]
  chosen, _ = sparse_ffn(*arrays, select=select)
  kernel, _ = sparse_ffn(*arrays, select=select, implementation="pallas_gpu")
  np.testing.assert_array_equal(chosen, kernel)


def test_gated_topk():
  score, up, d_h = (jax.random.normal(jax.random.key(i), (96, 13824),
                                      jnp.bfloat16) for i in range(3))

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, score, up, d_h):
    h, pull = jax.vjp(functools.partial(
        gated_topk, quantile=1.405, activation=gelu,
        implementation=implementation), score, up)
    return h, *pull(d_h)

  for a, b in zip(run("pallas_gpu", score, up, d_h),
                  run("xla", score, up, d_h)):
    assert error(a, b) < 5e-3


@pytest.mark.parametrize("batch, slots, window", [
    (1, 256, 2**30), (1, 1088, 2**30), (1, 4096, 2**30), (8, 4096, 1000),
    (3, 8192, 4096), (1, 65536, 2**30)])
def test_sparse_attention(batch, slots, window):
  keys = jax.random.split(jax.random.key(slots), 4)
  arrays = [jax.random.normal(key, (batch, 4, *shape), jnp.bfloat16)
            for key, shape in zip(keys, ((2, 256), (slots, 128), (slots, 128),
                                         (slots, 256)))]
  lengths = jnp.arange(slots - 3, 0, -slots // 9, jnp.int32)[:batch]
  run = jax.jit(functools.partial(
      sparse_attention, window=window, top_k=256, logit_softcap=50.0),
                static_argnames="implementation")
  y, kept = run(*arrays, lengths, implementation="pallas_gpu")
  with jax.default_matmul_precision("highest"):
    expected, count = run(*(a.astype(jnp.float32) for a in arrays), lengths,
                          implementation="reference")
  # Scores are summed in another order: a key may fall on the other side.
  assert np.abs(np.asarray(kept) - np.asarray(count)).max() <= 2
  assert error(y, expected) < 2e-2
  again, _ = run(*arrays, lengths, implementation="pallas_gpu")
  np.testing.assert_array_equal(y, again)
  assert attention.choose(jax.devices()[0], 256, *arrays) == "pallas_gpu"


@pytest.mark.parametrize("batch, slots, window", [
    (1, 256, 2**30), (1, 1088, 2**30), (8, 1088, 700), (3, 8192, 4096)])
def test_dense_attention(batch, slots, window):
  keys = jax.random.split(jax.random.key(slots), 3)
  rows, key, value = (
      jax.random.normal(k, (batch, *shape), jnp.bfloat16)
      for k, shape in zip(keys, ((16, 256), (4, slots, 256), (4, slots, 256))))
  # Nothing is turned.
  rotary = jnp.stack([jnp.ones((batch, 128)), jnp.zeros((batch, 128))], 1)
  lengths = jnp.arange(slots - 3, 0, -slots // 9, jnp.int32)[:batch]
  run = jax.jit(functools.partial(write_and_attend, window=window,
                                  logit_softcap=50.0,
                                  implementation="pallas_gpu"))
  y, caches = run(rows, rotary, key, value, lengths)
  put = jax.vmap(lambda cache, row, n: cache.at[:, n - 1].set(row))
  expected = [put(cache, row, lengths) for cache, row in zip(
      (key, value), (rows[:, 8:12], rows[:, 12:]))]
  for cache, x in zip(caches, expected):
    np.testing.assert_array_equal(cache, x)
  key, value = (x.astype(jnp.float32) for x in expected)
  slot, end = jnp.arange(slots), lengths[:, None]
  seen = ((slot < end) & (slot >= end - window))[:, None, None]
  with jax.default_matmul_precision("highest"):
    scores = jnp.einsum("bkge,bkse->bkgs", rows[:, :8].reshape(
        batch, 4, 2, 256).astype(jnp.float32), key) / 16
    weights = jax.nn.softmax(50 * jnp.tanh(scores / 50), where=seen)
    assert error(y, jnp.einsum("bkgs,bkse->bkge", weights, value)) < 1e-2
  np.testing.assert_array_equal(y, run(rows, rotary, *caches, lengths)[0])


def test_add_norm():
  x, y = (jax.random.normal(jax.random.key(i), (3, 2304), jnp.bfloat16)
          for i in range(2))
  scales = [jax.random.normal(jax.random.key(i), (2304,)) for i in (2, 3)]
  for a, b in zip(*(add_norm(x, y, *scales, epsilon=1e-6, implementation=name)
                    for name in ("pallas_gpu", "xla"))):
    assert error(a, b) < 5e-3


@pytest.mark.parametrize("rows", [2048, 4096])
def test_projection_after_add_norm(rows):
  x, y = (jax.random.normal(jax.random.key(i), (1, 2304), jnp.bfloat16)
          for i in range(2))
  scales = [jax.random.normal(jax.random.key(i), (2304,)) for i in (2, 3)]
  weights = jax.random.normal(jax.random.key(4), (rows, 2304), jnp.bfloat16)
  got, expected = (
      add_norm_and_project(x, y, *scales, weights, epsilon=1e-6,
                           implementation=name)
      for name in ("pallas_gpu", "xla"))
  for a, b in zip(got, expected):
    assert error(a, b) < 5e-3


def test_sparse_ffn_after_add_norm():
  """As in two steps."""
  x, *rest = make(SPARK, 1)
  y = jax.random.normal(jax.random.key(4), x.shape, jnp.bfloat16)
  scales = [jax.random.normal(jax.random.key(i), x.shape[1:]) for i in (5, 6)]
  select = CASES["spark"][1]
  run = jax.jit(functools.partial(add_norm_and_sparse_ffn, epsilon=1e-6,
                                  select=select, implementation="pallas_gpu"))
  got = run(x, y, *scales, *rest)
  total, normed = add_norm(x, y, *scales, epsilon=1e-6)
  expected, count = sparse_ffn(normed, *rest, select=select,
                               implementation="pallas_gpu")
  assert error(got[0], total) < 5e-3
  assert error(got[1], expected) < 1e-2
  assert abs(int(got[2][0]) - int(count[0])) <= 4


@pytest.mark.parametrize("batch, slots", [(1, 256), (1, 4160), (3, 1088)])
def test_attention_writes_a_turned_token(batch, slots):
  """Both kinds, at real angles, against their plain forms."""
  keys = jax.random.split(jax.random.key(slots), 4)
  rows, key, value = (
      jax.random.normal(k, (batch, *shape), jnp.bfloat16)
      for k, shape in zip(keys, ((16, 256), (4, slots, 256), (4, slots, 256))))
  lengths = jnp.arange(slots - 3, 0, -slots // 9, jnp.int32)[:batch]
  angles = (lengths[:, None] - 1) * 1e4 ** (-jnp.arange(128) / 128)
  rotary = jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)
  options = dict(window=2**30, logit_softcap=50.0)
  calls = {
      "dense": functools.partial(write_and_attend, rows, rotary, key, value,
                                 lengths, **options),
      "spark": functools.partial(
          attention.write_and_attend, rows, rotary, key[..., :128],
          key[..., 128:], value, lengths, top_k=256, **options)}
  for call in calls.values():
    y, *counts, caches = jax.jit(functools.partial(
        call, implementation="pallas_gpu"))()
    with jax.default_matmul_precision("highest"):
      expected, *same, written = jax.jit(functools.partial(
          call, implementation="reference"))()
    # What is read is bfloat16, and a key may fall on the threshold's other
    # side.
    assert error(y, expected) < 2e-2
    for a, b in zip(counts, same):
      assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 2
    for a, b in zip(caches, written):
      assert error(a, b) < 1e-3


def make_params(config):
  """Outputs of layers are as large as what they are added to.

  With the norms' scales as they are made, a token's own embedding decides.
  """
  params = nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(0))))
  for name in ("attention_out_norm", "ffn_out_norm"):
    norm = params["blocks"][name]
    norm["scale_D"] = norm["scale_D"] + 2.0
  return params


def record(decoder, prompts):
  """The logits of 20 tokens a row, the same tokens whatever they say."""
  recorder = Recorder()
  list(decoder.generate(prompts, 20, recorder, jax.random.key(0)))
  return recorder.logits_TxBxV


@pytest.mark.parametrize("shape, rows", itertools.product(
    ["spark", "dense"], [1, 3]))
def test_decoding_attends_by_kernels(monkeypatch, shape, rows):
  """Logits are those of the attention that training has."""
  config = ModelConfig(
      vocab_size=64, context_length=256, num_layers=2, model_dim=512,
      compute_dtype="bfloat16",
      ffn=FFNConfig(shape="gated", num_neurons=1024, sparsifier="none"),
      attention=AttentionConfig(shape=shape, num_query_heads=4, num_kv_heads=2,
                                head_dim=256, predictor_dim=128, top_k=24,
                                sliding_window=40, logit_softcap=50.0))
  params = make_params(config)
  prompts = [list(range(10, 31)) * 3, [3, 1, 4, 1, 5], [9]][:rows]
  logits = []
  for expected in ("pallas_gpu", "dense"):
    decoder = Decoder(config, params)
    logits.append(record(decoder, prompts))
    assert decoder.attention_implementations == [expected] * 2
    monkeypatch.setattr(decoding, "choose_attention", lambda *_: "dense")
  assert error(*logits) < 3e-2


def attention_arrays(heads, kv_heads, length=1024):
  """Query, key, value, and the gradient of the output, of 2 sequences."""
  key = 2, kv_heads, length, 256
  query = 2, kv_heads, heads // kv_heads, length, 256
  return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
          for i, shape in enumerate((query, key, key, query))]


@pytest.mark.parametrize("heads, cut, window, softcap", [
    (4, 400, 300, 0.0), (2, 0, 2**30, 0.0), (2, 700, 500, 50.0)])
def test_spark_attention(heads, cut, window, softcap):
  query, key, value, d_out = attention_arrays(heads, 2)
  index = np.arange(query.shape[3])
  positions, segments = (
      jnp.array(np.tile(x, (2, 1)), jnp.int32)
      for x in (np.where(index < cut, index, index - cut), index < cut))

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, window, query, key, value, d_out):
    def attend(query, key, value):
      mixed, *counts = spark_attention(
          query, key, value, positions, segments, window, predictor_dim=128,
          top_k=48, softcap=softcap, implementation=implementation)
      return mixed, counts

    mixed, pull, counts = jax.vjp(attend, query, key, value, has_aux=True)
    return [mixed, *pull(d_out)], counts

  arrays = query, key, value, d_out
  got, got_counts = run(None, window, *arrays)
  with jax.default_matmul_precision("highest"):
    expected, counts = run("reference", window,
                           *(x.astype(jnp.float32) for x in arrays))
  for a, b in zip(got, expected):
    assert error(a, b) < 8e-3
  # Scores are summed in another order: one may fall on the other side.
  assert error(got_counts[0], counts[0]) < 1e-3
  np.testing.assert_array_equal(got_counts[1], counts[1])
  again, _ = run("pallas_gpu", window, *arrays)
  for a, b in zip(got, again):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("where", range(3))
def test_spark_attention_shows_what_is_not_finite(where):
  arrays = attention_arrays(2, 2, 256)[:3]
  arrays[where] = arrays[where].at[..., 100, -1].set(jnp.nan)
  arrays[where] = arrays[where].at[..., 100, 0].set(jnp.nan)
  mixed, _, _ = spark_attention(
      *arrays, jnp.tile(jnp.arange(256), (2, 1)), None, 2**30,
      predictor_dim=128, top_k=48, implementation="pallas_gpu")
  assert np.isnan(np.asarray(mixed[..., 100, :], np.float32)).any()


FFN_CONFIG = ModelConfig(
    vocab_size=64, context_length=64, num_layers=2, model_dim=512,
    compute_dtype="bfloat16",
    ffn=FFNConfig(num_neurons=1024, predictor_dim=256, active_fraction=0.1),
    attention=AttentionConfig(shape="dense", num_query_heads=4, num_kv_heads=2,
                              head_dim=64))


def test_decoding_by_active_neurons():
  """Logits are those of every neuron."""
  params = make_params(FFN_CONFIG)
  prompts = [[3, 1, 4, 1, 5], [9], list(range(10, 31))]
  logits, fractions = [], []
  for skip, expected in ((True, "pallas_gpu"), (False, "dense")):
    decoder = Decoder(FFN_CONFIG, params, skip_inactive=skip)
    logits.append(record(decoder, prompts))
    assert decoder.ffn_implementations == [expected] * 2
    fractions.append(decoder.sparsity()["active_fraction"])
  assert fractions[0] == pytest.approx(fractions[1], rel=0.05)
  assert error(*logits) < 3e-2


def test_decoding_does_not_read_the_rows_of_neurons_that_never_fire():
  """NaN stands there: a prompt's tokens are fed one by one, too."""
  params = make_params(FFN_CONFIG)
  silent_F = np.arange(1024) >= 256
  ffn = params["blocks"]["ffn"]
  ffn["gate_DxF"] = jnp.where(silent_F, 0, ffn["gate_DxF"])
  expected = record(Decoder(FFN_CONFIG, params, prefill_chunk=1), [[3, 1, 4]])
  ffn["up_DxF"] = jnp.where(silent_F, jnp.nan, ffn["up_DxF"])
  ffn["down_FxD"] = jnp.where(silent_F[:, None], jnp.nan, ffn["down_FxD"])
  decoder = Decoder(FFN_CONFIG, params, prefill_chunk=1)
  np.testing.assert_array_equal(record(decoder, [[3, 1, 4]]), expected)
  assert decoder.ffn_implementations == ["pallas_gpu"] * 2
