"""Activation functions by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.errors import UserError


def relu2(x: jax.Array) -> jax.Array:
  """Squared ReLU, max(x, 0)^2 (So et al., 2021, arXiv 2109.08668)."""
  return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
  """x * Phi(x), exact."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by its tanh approximation, the one that Gemma uses."""
  return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": relu2,
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def get_activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The activation called `name`; `UserError` if there is none."""
  if name not in ACTIVATIONS:
    raise UserError(f"config.model.ffn.activation: {name!r} is not one of "
                    f"{', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]
