"""The operation in plain jax.numpy: every neuron computed, float32."""

import jax
import jax.numpy as jnp

from sparse_lm.kernels.sparse_ffn.select import Activation, Select


def product(x_BxR: jax.Array, rows_FxR: jax.Array) -> jax.Array:
  """rows x: one number a row of the matrix (B, F), in float32."""
  return jax.lax.dot_general(x_BxR, rows_FxR, (((1,), (1,)), ((), ())),
                             preferred_element_type=jnp.float32)


def split(x_BxD: jax.Array, gate_FxR: jax.Array, up_FxU: jax.Array | None
          ) -> tuple[jax.Array, jax.Array | None]:
  """What the gate reads of x, and what `up` does."""
  first = x_BxD[:, :gate_FxR.shape[1]]
  if up_FxU is None:
    return first, None
  return first, x_BxD[:, x_BxD.shape[1] - up_FxU.shape[1]:]


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`."""
  x_BxR, x_BxU = split(x_BxD, gate_FxR, up_FxU)
  activation_BxF = select(product(x_BxR, gate_FxR))
  hidden_BxF = activation_BxF
  if up_FxU is not None:
    hidden_BxF = hidden_BxF * up_activation(product(x_BxU, up_FxU))
  y_BxD = jnp.dot(hidden_BxF, down_FxD.astype(jnp.float32))
  return y_BxD.astype(x_BxD.dtype), jnp.count_nonzero(activation_BxF, axis=-1)
