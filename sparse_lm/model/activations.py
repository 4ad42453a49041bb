"""Activation functions by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def relu2(x: jax.Array) -> jax.Array:
  """Squared ReLU, max(x, 0)^2 (So et al., 2021, arXiv 2109.08668)."""
  return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
  """x * Phi(x), exact."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by its tanh approximation, the one that Gemma uses."""
  return jax.nn.gelu(x, approximate=True)


# The names are config.ACTIVATIONS.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": relu2,
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
