"""Penalties: their gradients in float64, the same however work is split."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.model.transformer import Statistics, model_graph
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training import sparsity

EPSILON = 1e-5  # of BlockFFN's chunk loss
LAYERS, NEURONS = 2, 64  # of tests/tiny.py
FACTOR, ADJACENT, CHUNK, CHUNK_LENGTH = 0.02, 0.02, 20.0, 12
PENALTIES = {"schedule": "constant", "factor": FACTOR, "adjacent": ADJACENT,
             "chunk": CHUNK, "chunk_length": CHUNK_LENGTH}


def weights_gradient(x, to_gate, to_up):
  """Gradients of one layer's gate and up matrices from those of g and u."""
  return (np.einsum("bld,blf->df", x, to_gate),
          np.einsum("bld,blf->df", x, to_up))


# L1.


@pytest.fixture(scope="module")
def l1(relu_config, make_batch, initial_params, in_float64):
  """For four reductions: the library's L1 and its gradients; by hand too.

  The first layer's FFN is silenced, so that the second one's L1 does not
  depend on it: both layers' gradients are then one product.
  """
  config = relu_config()
  params, batch = initial_params(config), make_batch(config)
  params["blocks"]["ffn_out_norm"]["scale_D"] -= 1
  kinds = [(neurons, layers) for neurons in ("sum", "mean")
           for layers in ("sum", "mean")]

  @jax.jit
  def library(params, factor):
    def penalties(params):
      _, statistics, _ = nnx.merge(model_graph(config.model), params).hidden(
          batch["tokens_BxL"], batch["positions_BxL"],
          batch["segment_ids_BxL"], measures=("l1",))
      return jnp.stack([sparsity.penalty_sum(
          statistics, factor, relu_config(penalty={
              "schedule": "constant", "over_neurons": neurons,
              "over_layers": layers})) for neurons, layers in kinds])
    return penalties(params), jax.jacrev(penalties)(params)["blocks"]["ffn"]

  x, g, u, counts = in_float64(config, params, batch)
  r = np.maximum(g, 0)
  each = np.abs(r * u) * counts[..., None]
  sign = np.sign(u) * (g > 0) * counts[..., None]
  by_hand = {}
  for neurons, layers in kinds:
    scale = 0.3 / (1 if neurons == "sum" else NEURONS) / (
        1 if layers == "sum" else LAYERS)
    by_hand[neurons, layers] = scale * each.sum(), [
        weights_gradient(x[n], scale * sign[n] * u[n], scale * sign[n] * r[n])
        for n in range(LAYERS)]
  values, gradients = jax.device_get(library(params, 0.3))
  return by_hand, {kind: (values[i], {name: grad[i] for name, grad
                                      in gradients.items()})
                   for i, kind in enumerate(kinds)}


@pytest.mark.parametrize("layers", ["sum", "mean"])
@pytest.mark.parametrize("neurons", ["sum", "mean"])
def test_l1_and_its_gradient_against_float64(l1, neurons, layers):
  (value, by_layer), (ours, gradient) = (kind[neurons, layers] for kind in l1)
  np.testing.assert_allclose(ours, value, rtol=1e-6)
  for n, (gate, up) in enumerate(by_layer):
    for name, expected in (("gate_DxF", gate), ("up_DxF", up)):
      assert np.abs(expected).max() > 0
      np.testing.assert_allclose(gradient[name][n], expected, rtol=1e-4,
                                 atol=1e-5 * np.abs(expected).max())
  assert not gradient["down_FxD"].any()


def test_the_sums_of_penalties_by_hand(relu_config):
  """Weights, and means over layers, of what was measured."""
  config = relu_config(penalty=PENALTIES)
  sums = {"l1": [3.0, 5.0], "adjacent": [2.0, 6.0],
          f"chunk_{CHUNK_LENGTH}": [0.5, 0.25]}
  total = sparsity.penalty_sum(Statistics(
      jnp.float32(9), {k: jnp.array(v) for k, v in sums.items()}), 0.1, config)
  assert float(total) == pytest.approx(
      0.1 * 4 + ADJACENT * 4 + CHUNK * 0.375, rel=1e-6)


# The whole loss.


@pytest.fixture(scope="module")
def penalized(relu_config, take_step):
  return take_step(relu_config(penalty=PENALTIES))


def l1_to_neurons(g, u, counts):
  r = np.maximum(g, 0)
  sign = np.sign(u) * (g > 0) * counts[..., None]
  return sign * u, sign * r


def adjacent_to_gate(g, segments):
  """Of mean over neurons of BCE(sigmoid(100 g_t+1), sigmoid(100 g_t))."""
  before, logits = 100 * g[:, :-1], 100 * g[:, 1:]
  after = 1 / (1 + np.exp(-logits))
  pairs = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  out = np.zeros_like(g)
  out[:, :-1] += (1 / (1 + np.exp(-before)) - after) * pairs[..., None]
  out[:, 1:] -= before * after * (1 - after) * pairs[..., None]
  return 100 * out / NEURONS


def chunk_to_gate(g, counts):
  """Of tokens times mean over neurons of 1 - prod(1 - p), chunk by chunk."""
  out = np.zeros_like(g)
  for first in range(0, g.shape[1], CHUNK_LENGTH):
    part = slice(first, first + CHUNK_LENGTH)
    r, counted = np.maximum(g[:, part], 0), counts[:, part, None]
    total = r.sum(-1, keepdims=True) + EPSILON
    p = r / total * counted
    spared = np.exp(np.log(1 - p + EPSILON).sum(1, keepdims=True))
    to_p = counted * spared / (1 - p + EPSILON) / NEURONS
    to_p *= counted.sum(1, keepdims=True)
    to_r = to_p / total - (to_p * r).sum(-1, keepdims=True) / total**2
    out[:, part] = to_r * (r > 0)
  return out


def test_penalties_add_their_gradient_by_hand(
    relu_config, make_batch, take_step, initial_params, in_float64, penalized):
  """On the last layer's gate and up, beside the cross-entropy's gradient.

  By hand: a mean over the batch's tokens, and over layers.
  """
  config = relu_config()
  params, batch = initial_params(config), make_batch(config)
  plain = take_step(config)[0].params
  x, g, u, counts = (a[-1] for a in (*in_float64(config, params, batch)[:3],
                                     [batch["segment_ids_BxL"] > 0]))
  mean = 1 / counts.sum() / LAYERS
  assert counts.sum() != batch["weights_BxL"].sum()
  to_gate, to_up = l1_to_neurons(g, u, counts)
  to_gate = FACTOR * to_gate
  parts = [to_gate, ADJACENT * adjacent_to_gate(g, batch["segment_ids_BxL"]),
           CHUNK * chunk_to_gate(g, counts)]
  expected = weights_gradient(x, mean * sum(parts), mean * FACTOR * to_up)
  for part in parts:  # None is lost beside the others.
    share = weights_gradient(x, mean * part, part)[0]
    assert np.linalg.norm(share) > 0.03 * np.linalg.norm(expected[0])
  for name, grad in zip(("gate_DxF", "up_DxF"), expected):
    ours = (plain["blocks"]["ffn"][name]
            - penalized[0].params["blocks"]["ffn"][name])[-1]
    np.testing.assert_allclose(ours, grad, rtol=1e-3,
                               atol=1e-3 * np.abs(grad).max())


@pytest.mark.parametrize("count", [2, 4, 8])
def test_micro_batches_do_not_change_the_gradient(
    relu_config, take_step, penalized, assert_same_step, count):
  config = relu_config(penalty=PENALTIES, **{
      "training.micro_batches": count})
  assert_same_step(take_step(config), penalized, 5e-6)


@pytest.mark.parametrize("axes", [
    {"data": 1}, {"data": 2}, {"data": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2}], ids=["1", "2", "4", "8"])
def test_devices_do_not_change_the_gradient(
    relu_config, take_step, penalized, assert_same_step, axes):
  config = relu_config(penalty=PENALTIES, mesh=axes)
  devices = jax.devices()[:np.prod(list(axes.values()))]
  mesh = mesh_lib.make_mesh(config, devices)
  assert_same_step(take_step(config, mesh=mesh), penalized, 5e-6)
