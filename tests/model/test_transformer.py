"""The whole model: layouts, packing, twins, sparsity by layer."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config as config_lib
from sparse_lm.config import (AttentionConfig, FFNConfig, LinearInputsConfig,
                              ModelConfig)
from sparse_lm.configs import gemma2_2b, spark_2b
from sparse_lm.model import Transformer
from sparse_lm.model.activity import COUNTS, REPORT
from sparse_lm.model.transformer import Layer, unstack

CONFIG = ModelConfig(
    vocab_size=60, context_length=16, num_layers=3, model_dim=32,
    ffn=FFNConfig(num_neurons=48, predictor_dim=16, active_fraction=0.2),
    attention=AttentionConfig(num_query_heads=4, num_kv_heads=2, head_dim=8,
                              predictor_dim=4, top_k=4, sliding_window=5),
    final_logit_softcap=30.0)


def tokens():
  return jax.random.randint(jax.random.key(1), (2, 16), 0, 60)


def forward(model, *inputs):
  """`model(*inputs)` in one compilation."""
  graph, params = nnx.split(model)
  return jax.jit(lambda params, inputs: nnx.merge(graph, params)(*inputs))(
      params, inputs)


def loss_and_gradient(config):
  graph, params = nnx.split(Transformer(config, nnx.Rngs(0)))

  def loss(params):
    logits, statistics = nnx.merge(graph, params)(tokens())
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0]), statistics

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def assert_close(a, b, tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      x, y, atol=tolerance, rtol=tolerance), a, b)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "block"])
def test_scan_and_remat_change_nothing(scan, remat):
  config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
  assert_close(loss_and_gradient(CONFIG), loss_and_gradient(config), 2e-5)


def test_scanned_and_unrolled_layers_have_the_same_parameters():
  config = dataclasses.replace(CONFIG, scan_layers=True)
  a, b = (nnx.state(Transformer(c, nnx.Rngs(0))) for c in (CONFIG, config))
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Gemma 3n's rule: top-k before GELU in the first layers, plain GeGLU after.
FIRST_ONLY = dataclasses.replace(CONFIG, num_layers=2, ffn=FFNConfig(
    shape="gated", num_neurons=48, active_fraction=0.2, sparse_layers="0"))


def with_ffn(config, **keys):
  return dataclasses.replace(
      config, ffn=dataclasses.replace(config.ffn, **keys))


def test_sparsifier_in_some_layers():
  """Layer 0 of a model that has it in all, layer 1 of one that has none."""
  configs = (FIRST_ONLY, with_ffn(FIRST_ONLY, sparse_layers="all"),
             with_ffn(FIRST_ONLY, sparsifier="none", sparse_layers="all"))
  graphs, params = zip(*[nnx.split(Transformer(config, nnx.Rngs(0)))
                         for config in configs])
  positions = jnp.broadcast_to(jnp.arange(16), (2, 16))

  @jax.jit
  def run(params):
    model, sparse, plain = (nnx.merge(*x) for x in zip(graphs, params))
    y, statistics, _ = model.hidden(tokens(), positions)
    x, sums = model.embedding_VxD[...][tokens()] * 32**0.5, []
    blocks = [next(sparse.layers()), list(plain.layers())[1]]
    for block, window in zip(blocks, (5, 2**30)):
      x, layer_sums, _ = block(x, Layer(window, True), positions, None, None,
                               COUNTS)
      sums.append(layer_sums)
    return (y, statistics), (model.final_norm(x), sums)

  (y, statistics), (expected, sums) = run(params)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  for name in COUNTS:
    np.testing.assert_array_equal(statistics.sums[name],
                                  [layer[name] for layer in sums])
  active = np.asarray(statistics.sums["active_neurons"]) / 32
  assert 0.1 * 48 < active[0] < 0.3 * 48
  assert active[1] > 0.99 * 48


@pytest.mark.parametrize("config", [
    FIRST_ONLY,
    dataclasses.replace(
        with_ffn(FIRST_ONLY, activation="silu", sparsifier="block_topk",
                 active_fraction=0.25, sparse_layers="1"),
        linear_inputs=LinearInputsConfig(sparsifier="topk"))],
    ids=["gemma_3n", "moc_and_q_sparse"])
def test_scan_with_a_sparsifier_in_some_layers(config):
  scanned = dataclasses.replace(config, scan_layers=True)
  assert_close(loss_and_gradient(config), loss_and_gradient(scanned), 2e-5)


def test_unstacked_layout_computes_the_same():
  model = Transformer(CONFIG, nnx.Rngs(0))
  layers = unstack(model)
  assert layers.blocks[1].ffn.up_DxF.shape == (16, 48)
  assert model.blocks.ffn.up_DxF.shape == (3, 16, 48)
  assert_close(forward(model, tokens())[0], forward(layers, tokens())[0], 1e-6)


def test_packed_documents_are_as_if_alone():
  model = Transformer(CONFIG, nnx.Rngs(0))
  first, second = tokens()[:1, :9], tokens()[1:, :7]
  packed = jnp.concatenate([first, second], 1)
  positions = jnp.concatenate([jnp.arange(9), jnp.arange(7)])[None]
  segments = jnp.array([[1] * 9 + [2] * 7])
  logits, _ = forward(model, packed, positions, segments)
  assert_close(logits[:, :9], forward(model, first)[0], 1e-5)
  assert_close(logits[:, 9:], forward(model, second)[0], 1e-5)


def test_causal_by_gradients():
  graph, params = nnx.split(Transformer(CONFIG, nnx.Rngs(0)))
  # One token of its own per position, so that rows of the table are inputs.
  row = jnp.arange(16)[None]

  @jax.jit
  @jax.jacobian
  def jacobian(table):
    changed = dict(nnx.to_pure_dict(params), embedding_VxD=table)
    x, _, _ = nnx.merge(graph, changed).hidden(row, row)
    return x[0].sum(-1)

  influence = np.abs(jacobian(params["embedding_VxD"][...]))[:, :16].sum(-1)
  assert np.all(influence[np.triu_indices(16, 1)] == 0)
  assert np.all(np.diag(influence) > 0)


@pytest.mark.parametrize("scan", [False, True])
def test_padding_does_not_count(scan):
  """In any measure: as if the document were alone."""
  config = dataclasses.replace(CONFIG, scan_layers=scan)
  model = Transformer(config, nnx.Rngs(0))
  names = (*REPORT, "adjacent", "chunk_4")
  graph, params = nnx.split(model)

  @jax.jit
  def measure(params, x, segments):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)
    return nnx.merge(graph, params).hidden(x, positions, segments,
                                           measures=names)[1]

  segments = jnp.array([[1] * 10 + [0] * 6, [0] * 16])
  padded = measure(params, tokens(), segments)
  alone = measure(params, tokens()[:1, :10], None)
  assert padded.tokens == alone.tokens == 10
  assert_close(padded, alone, 1e-4)
  assert set(padded.sums) == {*names, "attended_keys", "visible_keys"}
  assert padded.sums.pop("fired").shape == (3, 48)
  assert {x.shape for x in padded.sums.values()} == {(3,)}


def test_bfloat16_is_near_float32():
  model = Transformer(CONFIG, nnx.Rngs(0))
  half = Transformer(dataclasses.replace(CONFIG, compute_dtype="bfloat16"),
                     nnx.Rngs(0))
  a, b = forward(model, tokens())[0], forward(half, tokens())[0]
  assert b.dtype == jnp.float32
  assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.1


def largest(x, k):
  """True for the k entries of each row that are largest in magnitude."""
  order = np.argsort(-np.abs(x), axis=-1, kind="stable")
  mask = np.zeros(x.shape, bool)
  np.put_along_axis(mask, order[..., :k], True, axis=-1)
  return mask


def unit(x):
  """x over its root mean square."""
  return x / np.sqrt((x**2).mean(-1, keepdims=True))


def rope64(x, base):
  """Pair (i, i + n/2) of (L, heads, n) turned by position * base^(-2i/n)."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
  return np.concatenate([turned.real, turned.imag], -1)


def q_sparse_block64(x, w, keep):
  """A layer in float64: `keep` is applied to what each linear map reads."""
  length, (_, heads, width) = len(x), w["attention"]["query_DxHxE"].shape
  seen = keep(unit(x))
  q, k, v = (np.einsum("ld,dhe->lhe", seen, w["attention"][name]) for name in
             ("query_DxHxE", "key_DxKxE", "value_DxKxE"))
  q, k = rope64(q, 10_000.0), rope64(k, 10_000.0)
  mixed = np.zeros((length, heads, width))
  for i in range(length):
    for h in range(heads):
      served_by = h * k.shape[1] // heads
      weights = np.exp(k[:i + 1, served_by] @ q[i, h] / np.sqrt(width))
      mixed[i, h] = weights / weights.sum() @ v[:i + 1, served_by]
  output = w["attention"]["output_HxExD"].reshape(heads * width, -1)
  x = x + unit(keep(mixed.reshape(length, -1)) @ output)
  seen = keep(unit(x))
  h = (np.maximum(seen @ w["ffn"]["gate_DxF"], 0)**2
       * (seen @ w["ffn"]["up_DxF"]))
  return x + unit(keep(h) @ w["ffn"]["down_FxD"])


@pytest.mark.parametrize("sparsifier", ["topk", "block_topk"])
def test_q_sparse_layer(sparsifier):
  """arXiv 2407.10969 from embedding to logits: every linear map of a layer
  reads a sparse input, the output embedding does not."""
  inputs = LinearInputsConfig(sparsifier=sparsifier, active_fraction=0.5,
                              block_size=8)
  config = ModelConfig(
      vocab_size=60, context_length=16, num_layers=1, model_dim=16,
      ffn=FFNConfig(shape="gated", num_neurons=24, sparsifier="none",
                    activation="relu2"), linear_inputs=inputs,
      attention=AttentionConfig(shape="dense", num_query_heads=4,
                                num_kv_heads=2, head_dim=8))
  model = Transformer(config, nnx.Rngs(0))
  weights = jax.tree.map(lambda x: np.asarray(x, np.float64),
                         nnx.to_pure_dict(nnx.state(model)))
  w = jax.tree.map(lambda x: x[0], weights["blocks"])
  embedding, row = weights["embedding_VxD"], np.asarray(tokens()[0, :5])

  def keep(x):
    size = 8 if sparsifier == "block_topk" else x.shape[-1]
    blocks = x.reshape(*x.shape[:-1], -1, size)
    return unit(np.where(largest(blocks, size // 2), blocks, 0).reshape(
        x.shape))

  x = q_sparse_block64(embedding[row] * 4, w, keep)
  expected = unit(x) @ embedding.T
  logits, statistics = forward(model, row[None])
  np.testing.assert_allclose(logits[0], expected, atol=1e-4)
  # ReLU leaves about half, of which the input of `down` keeps at most half.
  assert 0 < statistics.sums["nonzero_hidden"][0] <= 5 * 12


def num_params(config):
  shapes = nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0)))
  return sum(x.size for x in jax.tree.leaves(nnx.state(shapes)))


def test_spark_2b_has_the_parameters_of_its_dense_twin():
  spark, dense = spark_2b.get_config(), gemma2_2b.get_config()
  # Gemma 2's own count: arXiv 2408.00118, Table 2: 2,024,517,888 beside
  # 590,118,912 of embedding (its 256,128 rows; ours are 256,000).
  embedding = 256_000 * 2304
  assert num_params(spark) == num_params(dense)
  assert num_params(spark) - embedding == 2_024_517_888
  assert config_lib.differences(spark, dense) == [
      "model.ffn.shape", "model.ffn.num_neurons", "model.ffn.sparsifier",
      "model.attention.shape"]
