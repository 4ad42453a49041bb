"""The formulas that every implementation of `gated_topk` shares."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Rule:
  """Everything but the arrays; `gated_topk` has the meanings.

  With y = max(s - theta, 0), theta = mean + Q std over a row of d scores s, n
  what the variance is divided by, and g the gradient of h = act(y) up_act(u):

      ds_i = p_i - c dtheta/ds_i    p_i = g_i act'(y_i) up_act(u_i) [y_i > 0]
      dtheta/ds_i = 1/d + Q (s_i - mean) / (n std)          c = sum_j p_j
  """

  quantile: float
  activation: Activation
  up_activation: Activation
  bessel: bool

  def deviation(self, squares: jax.Array, count: int) -> jax.Array:
    """std, of the sum of squares of `count` scores' distances to their mean."""
    variance = squares / max(count - self.bessel, 1)
    # sqrt(variance): kernels for GPUs have rsqrt alone.
    return variance * jax.lax.rsqrt(jnp.maximum(variance, 1e-37))

  def theta(self, mean: jax.Array, std: jax.Array) -> jax.Array:
    """The threshold of rows of that mean and std."""
    return mean + self.quantile * std

  def slope(self, std: jax.Array, count: int) -> jax.Array:
    """Q / (n std): dtheta/ds_i is 1/d + slope (s_i - mean).

    Rows of equal entries have s_i - mean = 0 at each, and any slope will do.
    """
    scale = self.quantile / max(count - self.bessel, 1)
    return scale / jnp.maximum(std, 1e-37)
