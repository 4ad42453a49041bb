"""Small parts that the blocks share."""

import math

from flax import nnx
import jax
import jax.numpy as jnp


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...],
                 fan_in: int) -> nnx.Param:
  """A float32 parameter drawn from N(0, 1 / fan_in)."""
  values = jax.random.normal(rngs.params(), shape, jnp.float32)
  return nnx.Param(values * fan_in**-0.5)


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(x / cap), which stays within +-cap; x itself for cap 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def project(x: jax.Array, weights: jax.Array, *, in_axes: int = 1,
            **dot_options) -> jax.Array:
  """Multiplies each token by a matrix, in x's type.

  Tokens are flattened for the product. It is the same to every backend but
  XLA's CPU one, which answers a contraction over two token axes (the weights'
  gradient) with a transposed copy of the activations, several times slower.

  Args:
    x: (B, L, in...).
    weights: (in..., out...).
    in_axes: how many axes `in...` is.
    **dot_options: for `jax.lax.dot`.

  Returns:
    (B, L, out...).
  """
  tokens, out = x.shape[:2], weights.shape[in_axes:]
  size = math.prod(x.shape[2:])
  y = jax.lax.dot(x.reshape(-1, size),
                  weights.astype(x.dtype).reshape(size, -1), **dot_options)
  return y.reshape(*tokens, *out)


class RMSNorm(nnx.Module):
  """x / rms(x) * (1 + scale), in float32 (Gemma's form: scale starts at 0)."""

  def __init__(self, dim: int, epsilon: float):
    self.scale_D = nnx.Param(jnp.zeros(dim, jnp.float32))
    self.epsilon = epsilon

  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    x = x_BxLxD.astype(jnp.float32)
    mean_square = jnp.square(x).mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon) * (1 + self.scale_D[...])
    return x.astype(x_BxLxD.dtype)


def rope_angles(positions: jax.Array, width: int, base: float) -> jax.Array:
  """How far the pairs of `width` dims turn, (..., width / 2), in radians."""
  half = width // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  return positions[..., None].astype(jnp.float32) * frequency


def rope(x: jax.Array, positions_BxL: jax.Array, base: float) -> jax.Array:
  """Rotary position embedding over the last axis (arXiv 2104.09864).

  The first half of the last axis pairs with the second half, as in Gemma.

  Args:
    x: (B, L, heads, width), width even.
    positions_BxL: int positions within the document.
    base: pair i of n turns by position * base^(-i/n) radians.
  """
  angle = rope_angles(positions_BxL[..., None], x.shape[-1], base)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin],
                         axis=-1).astype(x.dtype)
