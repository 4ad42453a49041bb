"""Activations against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from sparse_lm import config as config_lib
from sparse_lm.config import FFNConfig
from sparse_lm.errors import UserError
from sparse_lm.model.activations import make_activation

# Every 1/16 from -4 to 4: exact in float32, and so is each threshold below.
X = np.linspace(-4, 4, 129)
FORMULAS = {
    "linear": lambda x, t: x,
    "relu": lambda x, t: np.maximum(x, 0),
    "relu2": lambda x, t: np.maximum(x, 0) ** 2,
    "shifted_relu": lambda x, t: np.maximum(x - t, 0),
    "fatrelu": lambda x, t: np.where(x >= t, np.maximum(x, 0), 0),
    "silu": lambda x, t: x * scipy.special.expit(x),
    "gelu": lambda x, t: x * scipy.stats.norm.cdf(x),
    # (1 + tanh(u)) / 2 is the logistic function of 2 u.
    "gelu_tanh": lambda x, t: x * scipy.special.expit(
        np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),
}
WITH_THRESHOLD = ("shifted_relu", "fatrelu")


def apply(name, threshold, x=X):
  return np.asarray(make_activation(name, threshold)(jnp.array(x, jnp.float32)))


def test_every_name_has_a_formula():
  assert set(FORMULAS) == {"linear", *config_lib.ACTIVATIONS}


@pytest.mark.parametrize("threshold", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name, threshold):
  np.testing.assert_allclose(apply(name, threshold),
                             FORMULAS[name](X, threshold), atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_what_is_at_the_threshold(threshold):
  """fatrelu keeps it, shifted_relu has nothing left of it."""
  assert apply("fatrelu", threshold, threshold) == threshold
  assert apply("shifted_relu", threshold, threshold) == 0
  below = np.nextafter(np.float32(threshold), np.float32(-1))
  assert apply("fatrelu", threshold, below) == 0


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_survivors_have_the_slope_of_relu(name):
  f = make_activation(name, 0.5)
  slope = jax.vmap(jax.grad(f))(jnp.array(X[X != 0.5], jnp.float32))
  np.testing.assert_array_equal(slope, X[X != 0.5] > 0.5)


@pytest.mark.parametrize("name", config_lib.ACTIVATIONS)
def test_the_relu_family_is_what_is_zero_below_a_threshold(name):
  threshold = 0.25 if name in WITH_THRESHOLD else 0.0
  zero = apply(name, threshold) == 0
  is_cut = bool(zero[X < threshold].all())
  assert is_cut == (name in config_lib.RELU_FAMILY)
  assert not zero[X > threshold].any()


def test_type_is_kept():
  x = jnp.array(X, jnp.bfloat16)
  for name in FORMULAS:
    assert make_activation(name, 0.1)(x).dtype == jnp.bfloat16, name


@pytest.mark.parametrize("key", ["activation", "up_activation"])
def test_unknown_name_names_the_key(key):
  with pytest.raises(UserError, match=f"config.model.ffn.{key}: 'swish'"):
    FFNConfig(**{key: "swish"})
