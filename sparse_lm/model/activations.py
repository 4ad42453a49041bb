"""Activation functions by name."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def relu2(x: jax.Array) -> jax.Array:
  """Squared ReLU, max(x, 0)^2 (So et al., 2021, arXiv 2109.08668)."""
  return jnp.square(jax.nn.relu(x))


def shifted_relu(x: jax.Array, threshold: float) -> jax.Array:
  """max(x - threshold, 0): what survives is shifted (arXiv 2310.04564)."""
  return jax.nn.relu(x - threshold)


def fatrelu(x: jax.Array, threshold: float) -> jax.Array:
  """max(x, 0) where x >= threshold, else 0: what survives is kept as it is.

  Kurtz et al., 2020; ProSparse's third step (arXiv 2402.13516, Section 3.3).
  """
  return jnp.where(x >= threshold, jax.nn.relu(x), 0)


def gelu(x: jax.Array) -> jax.Array:
  """x * Phi(x), exact."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by its tanh approximation, the one that Gemma uses."""
  return jax.nn.gelu(x, approximate=True)


def linear(x: jax.Array) -> jax.Array:
  """x: the branch of a gated layer that has no activation."""
  return x


_PLAIN: dict[str, Activation] = {
    "linear": linear,
    "relu": jax.nn.relu,
    "relu2": relu2,
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
# The names are config.WITH_THRESHOLD.
_WITH_THRESHOLD = {"shifted_relu": shifted_relu, "fatrelu": fatrelu}


def make_activation(name: str, threshold: float) -> Activation:
  """The function of a name in `config.ACTIVATIONS`, or "linear".

  Args:
    name: which.
    threshold: for `shifted_relu` and `fatrelu`, the others have none.
  """
  if name in _WITH_THRESHOLD:
    return functools.partial(_WITH_THRESHOLD[name], threshold=threshold)
  return _PLAIN[name]
