"""The training step: the same gradient however the work is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm import config as config_lib
from sparse_lm.configs import spark_tiny
from sparse_lm.errors import UserError
from sparse_lm.kernels.statistical_topk import gated_topk
from sparse_lm.model import ffn
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training import metrics, program
from sparse_lm.training.optimizer import decay_mask, make_optimizer
from sparse_lm.training.step import make_eval_step


@pytest.fixture(scope="module")
def make_config(tiny_config):
  """Tiny, its vocabulary padded so that eight devices can split it."""
  return functools.partial(tiny_config, **{"model.vocab_size": 264})


@pytest.fixture(scope="module")
def reference(make_config, take_step):
  return take_step(make_config())


@pytest.mark.parametrize("count", [2, 8])
def test_micro_batches_change_nothing(make_config, take_step, reference,
                                      assert_same_step, count):
  config = make_config(**{"training.micro_batches": count})
  assert_same_step(take_step(config), reference)


@pytest.mark.parametrize("data, fsdp, tensor, scan", [
    (8, 1, 1, False), (1, 8, 1, False), (4, 1, 2, False), (2, 2, 2, True)])
def test_eight_devices_are_as_one(make_config, take_step, reference,
                                  assert_same_step, data, fsdp, tensor, scan):
  config = make_config(**{
      "training.mesh.data": data, "training.mesh.fsdp": fsdp,
      "training.mesh.tensor": tensor, "model.scan_layers": scan})
  mesh = mesh_lib.make_mesh(config)
  step = take_step(config, mesh=mesh)
  assert_same_step(step, reference)
  down = step[0].params["blocks"]["ffn"]["down_FxD"]
  assert down.addressable_shards[0].data.shape == (2, 64 // tensor, 32 // fsdp)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_attention_in_blocks_changes_nothing(make_config, take_step, reference,
                                             assert_same_step, on_mesh):
  config = make_config(**{
      "model.attention.query_chunk": 8, "model.scan_layers": True,
      "model.remat": "block", "training.mesh.data": 2, "training.mesh.fsdp": 2,
      "training.mesh.tensor": 2})
  mesh = mesh_lib.make_mesh(config) if on_mesh else None
  assert_same_step(take_step(config, mesh=mesh), reference)


def test_micro_batches_on_a_mesh_change_nothing(make_config, take_step,
                                                reference, assert_same_step):
  config = make_config(**{"training.micro_batches": 2})
  mesh = mesh_lib.make_mesh(config, jax.devices()[:4])
  assert_same_step(take_step(config, mesh=mesh), reference)


@pytest.mark.parametrize("keys, message", [
    ({"mesh.data": 3}, "data=3 x fsdp=1 x tensor=1 does not fit 8 device"),
    ({"mesh.fsdp": 16}, "does not fit 8 device"),
    ({"mesh.tensor": 8}, "num_kv_heads: 2 is not divisible by .* tensor=8"),
    ({"batch_size": 12}, "batch_size: 12 is not divisible"),
])
def test_a_mesh_that_does_not_fit(make_config, keys, message):
  config = make_config(**{f"training.{k}": v for k, v in keys.items()})
  with pytest.raises(UserError, match=message):
    mesh_lib.make_mesh(config)


def test_the_loss_in_chunks_is_the_loss(make_config, take_step, reference,
                                        assert_same_step):
  config = make_config(**{"training.loss_chunk": 8})
  assert_same_step(take_step(config), reference)


def use_separate_forms(monkeypatch):
  """Of top-k, activation and product, to compare with."""
  monkeypatch.setattr(ffn.FFN, "_in_one_pass", lambda *_: False)


def test_a_top_k_in_one_pass_changes_nothing(make_config, take_step,
                                             assert_same_step, monkeypatch):
  """No gradient, the penalty's included, and nothing that is measured."""
  config = make_config(**{
      "training.penalty.schedule": "constant", "training.penalty.factor": 0.05,
      "training.dead_neurons.after_tokens": 100})
  one_pass = take_step(config)
  use_separate_forms(monkeypatch)
  separate = take_step(config)
  assert_same_step(one_pass, separate, 5e-6)
  for name in ("active_neurons", "nonzero_hidden"):
    counts = [step[1]["sums"].statistics.sums[name]
              for step in (one_pass, separate)]
    assert np.all(counts[0] > 0)
    np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize("config, used", [
    (spark_tiny.get_config(), True),
    (config_lib.replace(spark_tiny.get_config(), **{
        "model.ffn.huber_delta": 0.1}), False),
    (config_lib.replace(spark_tiny.get_config(), **{
        "model.ffn.sparsifier": "topk"}), False)],
                         ids=["spark_tiny", "huber", "topk"])
def test_the_step_of_spark_tiny_has_its_top_k_in_one_pass(config, used,
                                                          monkeypatch):
  calls = []

  def spy(*arrays, **rest):
    calls.append(arrays)
    return gated_topk(*arrays, **rest)

  monkeypatch.setattr(ffn, "gated_topk", spy)
  mesh = mesh_lib.make_mesh(config, jax.devices()[:1])
  program.lower_train_step(config, mesh, np.ones(2048, np.float32))
  assert len(calls) == (config.model.num_layers if used else 0)


def test_metrics_against_float64(make_config, make_batch, initial_params):
  """Loss, z-loss and bits per byte from the logits, in NumPy."""
  from flax import nnx  # pylint: disable=g-import-not-at-top
  from sparse_lm.model.transformer import model_graph  # pylint: disable=g-import-not-at-top
  config = make_config()
  batch, params = make_batch(config), initial_params(config)
  text_bytes_V = np.arange(264, dtype=np.float32) % 3
  sums = jax.jit(make_eval_step(config, text_bytes_V))(params, batch)
  summary = metrics.summarize(jax.device_get(sums), config.model)

  @jax.jit
  def forward(params):
    return nnx.merge(model_graph(config.model), params)(
        batch["tokens_BxL"], batch["positions_BxL"], batch["segment_ids_BxL"])

  logits = np.asarray(forward(params)[0], np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  chosen = np.take_along_axis(logits, batch["targets_BxL"][..., None], -1)
  weights = batch["weights_BxL"]
  nats = ((log_z - chosen[..., 0]) * weights).sum()
  count = weights.sum()
  text_bytes = (text_bytes_V[batch["targets_BxL"]] * weights).sum()
  np.testing.assert_allclose(summary["loss"], nats / count, rtol=1e-5)
  np.testing.assert_allclose(summary["perplexity"], np.exp(nats / count),
                             rtol=1e-4)
  np.testing.assert_allclose(summary["bits_per_byte"],
                             nats / np.log(2) / text_bytes, rtol=1e-5)
  np.testing.assert_allclose(summary["z_loss"],
                             (log_z**2 * weights).sum() / count, rtol=1e-5)


def test_only_matrices_decay(make_config, initial_params):
  params = initial_params(make_config())
  mask = decay_mask(params)
  assert mask["embedding_VxD"] and mask["blocks"]["ffn"]["down_FxD"]
  assert not mask["final_norm"]["scale_D"]
  # A stacked scale has two axes, as a matrix has.
  assert params["blocks"]["ffn_norm"]["scale_D"].ndim == 2
  assert not mask["blocks"]["ffn_norm"]["scale_D"]


def test_the_gradient_is_clipped_by_its_global_norm(make_config):
  config = make_config(**{"training.optimizer.clip_norm": 0.5})
  params = {"a_DxF": jnp.ones((2, 2)), "b_D": jnp.ones(2)}
  grads = jax.tree.map(lambda x: 100 * x, params)
  optimizer = make_optimizer(config.training)
  # AdamW's first step does not see the scale; its second moment does.
  _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  squares = sum(float(jnp.sum(x)) for x in jax.tree.leaves(
      optax.tree_utils.tree_get(state, "nu")))
  np.testing.assert_allclose(squares, 0.5**2 * (1 - 0.95), rtol=1e-4)
