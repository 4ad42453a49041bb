"""The operation in XLA: on a GPU three kernels, and one more for the norm."""

import jax
import jax.numpy as jnp


def norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
  """x / rms(x) * (1 + scale), in float32, and then in x's type."""
  wide = x.astype(jnp.float32)
  mean_square = jnp.square(wide).mean(-1, keepdims=True)
  wide = wide * jax.lax.rsqrt(mean_square + epsilon) * (1 + scale_D)
  return wide.astype(x.dtype)


def add_norm(x_NxD: jax.Array, y_NxD: jax.Array, y_scale_D: jax.Array,
             scale_D: jax.Array, epsilon: float
             ) -> tuple[jax.Array, jax.Array]:
  """As `api.add_norm`."""
  x_NxD = x_NxD + norm(y_NxD, y_scale_D, epsilon)
  return x_NxD, norm(x_NxD, scale_D, epsilon)
