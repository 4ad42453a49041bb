"""The operation in plain jax.numpy: every neuron computed, float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Select = Callable[[jax.Array], jax.Array]
Activation = Callable[[jax.Array], jax.Array]


def scores(x_BxR: jax.Array, gate_RxF: jax.Array) -> jax.Array:
  """The gate's dense product (B, F), in float32."""
  return jnp.dot(x_BxR, gate_RxF, preferred_element_type=jnp.float32)


def sparse_ffn(x_gate_BxR: jax.Array, x_up_BxU: jax.Array | None,
               gate_RxF: jax.Array, up_FxU: jax.Array | None,
               down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`."""
  activation_BxF = select(scores(x_gate_BxR, gate_RxF))
  hidden_BxF = activation_BxF
  if up_FxU is not None:
    up_BxF = jnp.dot(x_up_BxU, up_FxU.T, preferred_element_type=jnp.float32)
    hidden_BxF = hidden_BxF * up_activation(up_BxF)
  y_BxD = jnp.dot(hidden_BxF, down_FxD.astype(jnp.float32))
  return (y_BxD.astype(x_gate_BxR.dtype),
          jnp.count_nonzero(activation_BxF, axis=-1))
