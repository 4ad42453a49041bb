"""Feed-forward layers against formulas in float64 and against Gemma 3n."""

import dataclasses
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from sparse_lm.config import FFNConfig, LinearInputsConfig
from sparse_lm.model.ffn import FFN

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gemma3n_topk.json"
DENSE_INPUTS = LinearInputsConfig()
D, F, R = 16, 40, 6


def relu(x):
  return np.maximum(x, 0)


def silu(x):
  return x * scipy.special.expit(x)


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def make(inputs=DENSE_INPUTS, **keys):
  config = FFNConfig(num_neurons=F, predictor_dim=R, **keys)
  layer = FFN(config, inputs, D, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, 3, D))
  weights = {k: np.asarray(v, np.float64)
             for k, v in nnx.to_pure_dict(nnx.state(layer)).items()}
  return layer, x, np.asarray(x, np.float64), weights


def test_plain():
  layer, x, x64, w = make(shape="plain", sparsifier="none", activation="relu")
  y, activity = layer(x)
  h = relu(x64 @ w["gate_DxF"])
  np.testing.assert_allclose(y, h @ w["down_FxD"], atol=1e-5)
  np.testing.assert_allclose(activity.hidden_BxLxF, h, atol=1e-5)


def test_gated():
  layer, x, x64, w = make(shape="gated", sparsifier="none")
  h = gelu_tanh(x64 @ w["gate_DxF"]) * (x64 @ w["up_DxF"])
  np.testing.assert_allclose(layer(x)[0], h @ w["down_FxD"], atol=1e-5)


@pytest.mark.parametrize("shape", ["gated", "spark"])
def test_drelu(shape):
  """arXiv 2406.05955: max(0, gate x) * max(0, up x)."""
  layer, x, x64, w = make(shape=shape, sparsifier="none", activation="relu",
                          up_activation="relu")
  x_gate, x_up = (x64, x64) if shape == "gated" else np.split(x64, [R], -1)
  gate, up = x_gate @ w["gate_DxF"], x_up @ w["up_DxF"]
  h = relu(gate) * relu(up)
  y, activity = layer(x)
  np.testing.assert_allclose(y, h @ w["down_FxD"], atol=1e-5)
  # Half of the gates are active, a quarter of the outputs are.
  np.testing.assert_array_equal(activity.activation_BxLxF != 0, gate > 0)
  np.testing.assert_array_equal(activity.hidden_BxLxF != 0,
                                (gate > 0) & (up > 0))


def test_threshold_on_both_branches():
  layer, x, x64, w = make(shape="gated", sparsifier="none", threshold=0.3,
                          activation="fatrelu", up_activation="shifted_relu")
  gate, up = x64 @ w["gate_DxF"], x64 @ w["up_DxF"]
  h = np.where(gate >= 0.3, gate, 0) * relu(up - 0.3)
  np.testing.assert_allclose(layer(x)[0], h @ w["down_FxD"], atol=1e-5)


@pytest.mark.parametrize("activation, up_activation, threshold", [
    ("relu", "linear", 0.0), ("relu2", "relu", 0.0),
    ("shifted_relu", "linear", 0.4), ("fatrelu", "linear", 0.4),
    ("fatrelu", "fatrelu", 0.4), ("relu", "fatrelu", 0.4),
    ("relu2", "shifted_relu", 0.4),
])
def test_margin_is_above_zero_where_the_activation_is(activation, up_activation,
                                                      threshold):
  layer, x, _, _ = make(shape="gated", sparsifier="none", threshold=threshold,
                        activation=activation, up_activation=up_activation)
  activity = layer.hidden(x)
  np.testing.assert_array_equal(activity.margin_BxLxF > 0,
                                activity.activation_BxLxF > 0)
  np.testing.assert_allclose(
      activity.gate_BxLxF - activity.margin_BxLxF,
      threshold if activation in ("shifted_relu", "fatrelu") else 0, atol=1e-6)


def spark_formula(x64, w, k):
  """arXiv 2506.06644, Eq. 2, in float64."""
  predicted = x64[..., :R] @ w["gate_DxF"]
  if k < F:
    theta = (predicted.mean(-1, keepdims=True)
             + predicted.std(-1, keepdims=True)
             * scipy.stats.norm.ppf(1 - k / F))
    predicted = np.maximum(predicted - theta, 0)
  return (gelu_tanh(predicted) * (x64[..., R:] @ w["up_DxF"])) @ w["down_FxD"]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_spark(fraction):
  layer, x, x64, w = make(shape="spark", active_fraction=fraction)
  k = layer.config.num_active
  np.testing.assert_allclose(layer(x)[0], spark_formula(x64, w, k), atol=1e-5)


def test_spark_with_everything_active_is_the_dense_formula():
  layer, x, x64, w = make(shape="spark", active_fraction=1.0)
  h = gelu_tanh(x64[..., :R] @ w["gate_DxF"]) * (x64[..., R:] @ w["up_DxF"])
  np.testing.assert_allclose(layer(x)[0], h @ w["down_FxD"], atol=1e-5)


def largest(rows, k):
  """True for the k largest of each row, of equals the first."""
  order = np.argsort(-rows, axis=-1, kind="stable")
  mask = np.zeros(rows.shape, bool)
  np.put_along_axis(mask, order[..., :k], True, axis=-1)
  return mask


@pytest.mark.parametrize("sparsifier", ["topk", "approx_topk"])
@pytest.mark.parametrize("shape", ["plain", "gated", "spark"])
def test_exact_topk_comes_before_the_activation(shape, sparsifier):
  """By raw values: GELU's order is another one below -0.75."""
  layer, x, x64, w = make(shape=shape, sparsifier=sparsifier,
                          active_fraction=0.9)
  x_gate, x_up = np.split(x64, [R], -1) if shape == "spark" else (x64, x64)
  gate = x_gate @ w["gate_DxF"]
  mask = largest(gate, 36)
  h = gelu_tanh(gate * mask)
  if shape != "plain":
    h *= x_up @ w["up_DxF"]
  y, activity = layer(x)
  np.testing.assert_allclose(y, h @ w["down_FxD"], atol=1e-5)
  np.testing.assert_array_equal(activity.gate_BxLxF != 0, mask)
  assert np.any(largest(gelu_tanh(gate), 36) != mask)


def test_mixture_of_channels():
  """MoC 2:8: the top 2 of 8 raw gates, then SiLU, times up."""
  layer, x, x64, w = make(shape="gated", sparsifier="block_topk",
                          active_fraction=0.25, activation="silu")
  gate = x64 @ w["gate_DxF"]
  mask = largest(gate.reshape(2, 3, 5, 8), 2).reshape(gate.shape)
  h = mask * silu(gate) * (x64 @ w["up_DxF"])
  y, activity = layer(x)
  np.testing.assert_allclose(y, h @ w["down_FxD"], atol=1e-5)
  np.testing.assert_array_equal(activity.hidden_BxLxF != 0, mask)


@pytest.mark.parametrize("sparsifier", ["topk", "approx_topk", "block_topk"])
def test_gates_that_are_cut_have_no_gradient(sparsifier):
  layer, x, x64, w = make(shape="plain", sparsifier=sparsifier,
                          active_fraction=0.25)
  graph, params = nnx.split(layer)
  grads = jax.grad(lambda p: nnx.merge(graph, p)(x[:1, :1])[0].sum())(params)
  gate = x64[0, 0] @ w["gate_DxF"]
  mask = (largest(gate.reshape(5, 8), 2).ravel()
          if sparsifier == "block_topk" else largest(gate, 10))
  moved = np.abs(grads["gate_DxF"][...]).sum(0) > 0
  np.testing.assert_array_equal(moved, mask)


@pytest.mark.parametrize("keys", [
    {"shape": "spark"},
    {"shape": "gated", "sparsifier": "topk"},
    {"shape": "gated", "sparsifier": "none", "activation": "relu",
     "up_activation": "relu"},
], ids=["spark", "topk", "drelu"])
def test_zero_outputs_of_neurons_need_no_rows_of_down(keys):
  layer, x, _, w = make(active_fraction=0.2, **keys)
  y, activity = layer(x)
  token = np.asarray(activity.hidden_BxLxF)[0, 0]
  kept = token != 0
  assert 0 < kept.sum() < F
  np.testing.assert_allclose(token[kept] @ w["down_FxD"][kept], y[0, 0],
                             atol=1e-5)


def test_spark_has_no_parameters_of_its_own():
  def count(config):
    return sum(x.size for x in jax.tree.leaves(
        nnx.state(FFN(config, DENSE_INPUTS, D, nnx.Rngs(0)))))

  plain = count(FFNConfig(shape="plain", num_neurons=F, predictor_dim=R))
  spark = count(FFNConfig(shape="spark", num_neurons=F, predictor_dim=R))
  assert plain == spark == 2 * D * F


def q_sparse(x, k):
  """arXiv 2407.10969: X * M over its L2 norm, times the root of the width."""
  kept = x * largest(np.abs(x), k)
  norm = np.sqrt((kept**2).sum(-1, keepdims=True))
  return kept / norm * np.sqrt(x.shape[-1])


@pytest.mark.parametrize("shape", ["plain", "gated", "spark"])
def test_q_sparse_inputs_of_gate_up_and_down(shape):
  """With ReLU^2 as in the paper's ReLU2GLU, and 60% of the entries kept."""
  layer, x, x64, w = make(LinearInputsConfig(sparsifier="topk"), shape=shape,
                          sparsifier="none", activation="relu2")
  seen = q_sparse(x64, 10)
  x_gate, x_up = np.split(seen, [R], -1) if shape == "spark" else (seen, seen)
  h = relu(x_gate @ w["gate_DxF"]) ** 2
  if shape != "plain":
    h *= x_up @ w["up_DxF"]
  y, activity = layer(x)
  np.testing.assert_allclose(y, q_sparse(h, 24) @ w["down_FxD"], atol=2e-5)
  assert np.count_nonzero(activity.hidden_BxLxF, -1).max() <= 24


def gemma_3n():
  """The golden values, and a layer with their weights."""
  golden = json.loads(GOLDEN.read_text())
  gate = jnp.array(golden["gate"])
  config = FFNConfig(
      shape="gated", num_neurons=gate.shape[1],
      active_fraction=1 - golden["sparsity"], activation="gelu_tanh")
  layer = FFN(config, DENSE_INPUTS, gate.shape[0], nnx.Rngs(0))
  layer.gate_DxF[...] = gate
  layer.up_DxF[...] = jnp.array(golden["up"])
  layer.down_FxD[...] = jnp.array(golden["down"])
  return golden, layer, jnp.array(golden["x"])[None]


@pytest.mark.parametrize("sparse", [True, jnp.array(True)],
                         ids=["bool", "array"])
def test_gemma_3n_layer(sparse):
  golden, layer, x = gemma_3n()
  y, _ = layer(x, sparse)
  np.testing.assert_allclose(y[0], golden["mlp_output"], atol=1e-6)


@pytest.mark.parametrize("sparse", [False, jnp.array(False)],
                         ids=["bool", "array"])
def test_gemma_3n_layer_that_is_not_sparse_is_plain_geglu(sparse):
  golden, layer, x = gemma_3n()
  y, activity = layer(x, sparse)
  x64, gate, up, down = (np.array(golden[name], np.float64)
                         for name in ("x", "gate", "up", "down"))
  expected = (gelu_tanh(x64 @ gate) * (x64 @ up)) @ down
  np.testing.assert_allclose(y[0], expected, atol=1e-6)
  np.testing.assert_allclose(activity.gate_BxLxF[0], golden["gate_output"],
                             atol=1e-6)


def test_a_sparsifier_that_is_off_passes_gradients_as_none_does():
  """A switch in a scan computes both branches; their gradients must not mix."""
  layer, x, _, _ = make(shape="gated", sparsifier="topk", active_fraction=0.1)
  plain = FFN(dataclasses.replace(layer.config, sparsifier="none"),
              DENSE_INPUTS, D, nnx.Rngs(0))

  def gradient(layer, sparse):
    graph, params = nnx.split(layer)
    return jax.grad(
        lambda p: jnp.square(nnx.merge(graph, p)(x, sparse)[0]).sum())(params)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
               gradient(layer, jnp.array(False)), gradient(plain, True))
