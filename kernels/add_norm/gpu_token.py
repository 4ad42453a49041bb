"""Inside the GPU kernels: one token's sum and its norm."""

from collections.abc import Callable

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu

# Numbers of a token in one load: 4 a thread.
_COLUMNS = 512


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
    x = x.astype(jnp.float32)
    mean_square = add_up(x * x) / x.size
    x = x * lax.rsqrt(mean_square + epsilon) * (1.0 + scale)
    return x.astype(jnp.bfloat16)

  # In float32 a sum of two bfloat16 numbers is rounded once, as by XLA.
  x = x.astype(jnp.float32) + norm(y, y_scale).astype(jnp.float32)
  x = x.astype(jnp.bfloat16)
  return x, norm(x, scale)


def load_and_add(refs, epsilon: float) -> tuple[jax.Array, jax.Array]:
  """As `add_and_norm`, of arrays (D,) in memory that one warpgroup loads."""
  columns = refs[0].shape[0]
  vector = 4 if columns % _COLUMNS == 0 else 2
  layout = plgpu.Layout.WG_STRIDED((columns,), vector)
  return add_and_norm(*(mosaic_gpu.load(ref, layout, optimized=False)
                        for ref in refs), epsilon)
