"""Which neurons are active: ways to turn scores into activations."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]
# From scores (B, F) in float32 to activations (B, F), exactly 0 where inactive.
# Any function will do; a kernel can take in the two classes below whole.
Select = Callable[[jax.Array], jax.Array]


def linear(x: jax.Array) -> jax.Array:
  """x: a branch without an activation."""
  return x


@dataclasses.dataclass(frozen=True)
class Elementwise:
  """activation(score): each neuron by itself, as the ReLU family does.

  Attributes:
    activation: exactly 0 for inactive neurons.
  """

  activation: Activation

  def __call__(self, score_BxF: jax.Array) -> jax.Array:
    return self.activation(score_BxF)


@dataclasses.dataclass(frozen=True)
class StatisticalTopk:
  """activation(max(score - theta, 0)), theta = mean + quantile * std.

  Mean and standard deviation are over a token's neurons (Spark Transformer,
  arXiv 2506.06644, Eq. 10).

  Attributes:
    quantile: of N(0, 1), at the fraction that is to be inactive.
    activation: 0 at 0.
    bessel: divide the variance by F - 1, not by F.
  """

  quantile: float
  activation: Activation
  bessel: bool = False

  def theta(self, mean: jax.Array, square: jax.Array, count: int) -> jax.Array:
    """The threshold.

    Args:
      mean: of the scores.
      square: sum of the squared deviations from it.
      count: of the scores.
    """
    variance = square / (count - self.bessel)
    # sqrt(variance): kernels for GPUs have rsqrt alone.
    std = variance * jax.lax.rsqrt(jnp.maximum(variance, 1e-37))
    return mean + self.quantile * std

  def __call__(self, score_BxF: jax.Array) -> jax.Array:
    mean_Bx1 = score_BxF.mean(-1, keepdims=True)
    square_Bx1 = jnp.square(score_BxF - mean_Bx1).sum(-1, keepdims=True)
    theta_Bx1 = self.theta(mean_Bx1, square_Bx1, score_BxF.shape[-1])
    return self.activation(jnp.maximum(score_BxF - theta_Bx1, 0))
