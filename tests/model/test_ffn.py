"""Feed-forward layers against formulas in float64 and against Gemma 3n."""

import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from sparse_lm import config as config_lib
from sparse_lm.config import FFNConfig
from sparse_lm.errors import UserError
from sparse_lm.model.activations import ACTIVATIONS
from sparse_lm.model.ffn import FFN

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gemma3n_topk.json"
D, F, R = 16, 40, 6


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * scipy.special.expit(x),
    "gelu": lambda x: x * scipy.stats.norm.cdf(x),
    "gelu_tanh": gelu_tanh,
}


def make(**keys):
  config = FFNConfig(num_neurons=F, predictor_dim=R, **keys)
  layer = FFN(config, D, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, 3, D))
  weights = {k: np.asarray(v, np.float64)
             for k, v in nnx.to_pure_dict(nnx.state(layer)).items()}
  return layer, x, np.asarray(x, np.float64), weights


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
  x = np.linspace(-4, 4, 81)
  np.testing.assert_allclose(ACTIVATIONS[name](jnp.array(x, jnp.float32)),
                             FORMULAS[name](x), atol=1e-5)


def test_unknown_activation_names_the_key():
  assert tuple(ACTIVATIONS) == config_lib.ACTIVATIONS
  with pytest.raises(UserError, match="config.model.ffn.activation: 'swish'"):
    FFNConfig(activation="swish")


def test_plain():
  layer, x, x64, w = make(shape="plain", sparsifier="none", activation="relu")
  y, active = layer(x)
  h = np.maximum(x64 @ w["gate_DxF"], 0)
  np.testing.assert_allclose(y, h @ w["down_FxD"], atol=1e-5)
  np.testing.assert_array_equal(active, (h > 0).sum(-1))


def test_gated():
  layer, x, x64, w = make(shape="gated", sparsifier="none")
  h = gelu_tanh(x64 @ w["gate_DxF"]) * (x64 @ w["up_DxF"])
  np.testing.assert_allclose(layer(x)[0], h @ w["down_FxD"], atol=1e-5)


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


def test_active_count_is_of_the_neurons_that_matter():
  layer, x, _, w = make(shape="spark", active_fraction=0.2)
  h, active = layer.hidden(x)
  np.testing.assert_array_equal(active, (np.asarray(h) != 0).sum(-1))
  # Zeroing the inactive neurons' rows of `down` changes nothing.
  token = np.asarray(h)[0, 0]
  kept = np.where((token != 0)[:, None], w["down_FxD"], 0)
  np.testing.assert_allclose(token @ kept, layer(x)[0][0, 0], atol=1e-5)


def test_spark_has_no_parameters_of_its_own():
  def count(config):
    return sum(x.size for x in jax.tree.leaves(
        nnx.state(FFN(config, D, nnx.Rngs(0)))))

  plain = count(FFNConfig(shape="plain", num_neurons=F, predictor_dim=R))
  spark = count(FFNConfig(shape="spark", num_neurons=F, predictor_dim=R))
  assert plain == spark == 2 * D * F


def test_gemma_3n_layer():
  golden = json.loads(GOLDEN.read_text())
  gate = jnp.array(golden["gate"])
  config = FFNConfig(
      shape="gated", num_neurons=gate.shape[1],
      active_fraction=1 - golden["sparsity"], activation="gelu_tanh")
  layer = FFN(config, gate.shape[0], nnx.Rngs(0))
  layer.gate_DxF[...] = gate
  layer.up_DxF[...] = jnp.array(golden["up"])
  layer.down_FxD[...] = jnp.array(golden["down"])
  y, _ = layer(jnp.array(golden["x"])[None])
  np.testing.assert_allclose(y[0], golden["mlp_output"], atol=1e-6)
