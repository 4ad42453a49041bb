"""The whole model: layouts, packing, twins."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config as config_lib
from sparse_lm.config import AttentionConfig, FFNConfig, ModelConfig
from sparse_lm.configs import gemma2_2b, spark_2b
from sparse_lm.model import Transformer
from sparse_lm.model.transformer import unstack

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


def test_padding_does_not_count():
  model = Transformer(CONFIG, nnx.Rngs(0))
  segments = jnp.array([[1] * 10 + [0] * 6, [0] * 16])
  _, statistics = forward(model, tokens(), None, segments)
  _, alone = forward(model, tokens()[:1, :10])
  assert statistics.tokens == alone.tokens == 10
  assert_close(statistics, alone, 1e-5)


def test_bfloat16_is_near_float32():
  model = Transformer(CONFIG, nnx.Rngs(0))
  half = Transformer(dataclasses.replace(CONFIG, compute_dtype="bfloat16"),
                     nnx.Rngs(0))
  a, b = forward(model, tokens())[0], forward(half, tokens())[0]
  assert b.dtype == jnp.float32
  assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.1


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
