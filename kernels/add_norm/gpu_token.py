"""Inside the GPU kernels: one token's sum and its norm."""

from collections.abc import Callable

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu

# Numbers of a token in one load: 4 a thread.
_COLUMNS = 512


def rms_factor(x, epsilon: float, add_up: Callable[[jax.Array], jax.Array]
               = jnp.sum) -> jax.Array:
  """1 / rms(x), a scalar; see `add_and_norm` for the arguments."""
  x = x.astype(jnp.float32)
  return lax.rsqrt(add_up(x * x) / x.size + epsilon)


def scaled(x, factor, scale) -> jax.Array:
  """x * factor * (1 + scale) in float32, then bfloat16."""
  x = x.astype(jnp.float32) * factor * (1.0 + scale)
  return x.astype(jnp.bfloat16)


def add(x, y) -> jax.Array:
  """x + y: in float32 that is rounded once, as by XLA."""
  total = x.astype(jnp.float32) + y.astype(jnp.float32)
  return total.astype(jnp.bfloat16)


def add_and_norm(x, y, y_scale, scale, epsilon: float,
                 add_up: Callable[[jax.Array], jax.Array] = jnp.sum
                 ) -> tuple[jax.Array, jax.Array]:
  """x + norm(y) and its norm, of one token, both like x in bfloat16.

  Args:
    x: (D,), or all of another shape.
    y: what is added.
    y_scale: of its norm.
    scale: of the sum's.
    epsilon: added to mean squares.
    add_up: sums an array's numbers.
  """
  def norm(x, scale):
    return scaled(x, rms_factor(x, epsilon, add_up), scale)

  x = add(x, norm(y, y_scale))
  return x, norm(x, scale)


def load_token(refs) -> list[jax.Array]:
  """Arrays (D,) in memory that one warpgroup loads."""
  columns = refs[0].shape[0]
  vector = 4 if columns % _COLUMNS == 0 else 2
  layout = plgpu.Layout.WG_STRIDED((columns,), vector)
  return [mosaic_gpu.load(ref, layout, optimized=False) for ref in refs]
