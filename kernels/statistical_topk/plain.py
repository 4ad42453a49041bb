"""Statistical top-k of rows, its backward pass by hand.

With u = x - theta, theta = mean + Q std, h the corner (ReLU, or Huber's), d
the row's length and n what the variance is divided by:

    y = h(u)    dx_i = h'(u_i) g_i - c dtheta/dx_i    c = sum_j h'(u_j) g_j
    dtheta/dx_i = 1/d + Q (x_i - mean) / (n std)

The backward pass has x, which whatever made it keeps anyway, and two numbers
a row: no array of x's size is stored for it.
"""

import functools

import jax
import jax.numpy as jnp

from sparse_lm.kernels.gaussian import quantile


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _statistics(x, bessel):
  """Mean and std of each row, in one pass.

  About the row's first entry, since squares about 0 would leave few digits of
  the variance where the mean is far from it.
  """
  x, count = _wide(x), x.shape[-1]
  pivot = x[..., :1]
  off = x - pivot
  mean = off.sum(-1, keepdims=True) / count
  squares = jnp.square(off).sum(-1, keepdims=True) - count * jnp.square(mean)
  std = jnp.sqrt(jnp.maximum(squares, 0) / max(count - bessel, 1))
  return pivot + mean, std


def _above(x, mean, std, k):
  """u = x - theta."""
  return _wide(x) - (mean + float(quantile(k, x.shape[-1])) * std)


def _threshold(x, mean, std, k, huber_delta):
  y = jax.nn.relu(_above(x, mean, std, k))
  if huber_delta:
    y = jnp.where(y <= huber_delta, jnp.square(y) / (2 * huber_delta),
                  y - huber_delta / 2)
  return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def statistical_topk(x: jax.Array, k: float, bessel: bool = False,
                     huber_delta: float = 0.0) -> jax.Array:
  """Keeps about the k largest entries of the last axis, less their threshold.

  Args:
    x: any shape and float type. Statistics are in float32 or wider.
    k: below the size of the last axis.
    bessel: divide the variance by d - 1, not by d.
    huber_delta: width of the rounded corner; 0: max(x - theta, 0).

  Returns:
    An array of x's shape and type.
  """
  return _threshold(x, *_statistics(x, bessel), k, huber_delta)


def _forward(x, k, bessel, huber_delta):
  mean, std = _statistics(x, bessel)
  return _threshold(x, mean, std, k, huber_delta), (x, mean, std)


def _backward(k, bessel, huber_delta, residuals, gradient):
  x, mean, std = residuals
  above, count = _above(x, mean, std, k), x.shape[-1]
  if huber_delta:
    slope = jnp.clip(above / huber_delta, 0, 1)
  else:
    slope = (above > 0).astype(above.dtype)
  passed = slope * _wide(gradient)
  # Rows of equal entries: their std has no slope.
  scale = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1), 0)
  scale *= float(quantile(k, count)) / max(count - bessel, 1)
  d_theta = 1 / count + scale * (_wide(x) - mean)
  total = passed.sum(-1, keepdims=True)
  return ((passed - total * d_theta).astype(x.dtype),)


statistical_topk.defvjp(_forward, _backward)
