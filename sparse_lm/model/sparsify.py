"""Operators that make activations sparse.

Statistical top-k (Spark Transformer, arXiv 2506.06644, Section 3, Eq. 10)
estimates the k-th largest of d entries from their mean and standard deviation,
as if they were Gaussian, and subtracts it:

    theta(x, k) = mean(x) + std(x) * Q(1 - k/d)
    y           = max(x - theta(x, k), 0)

with Q the quantile function of N(0, 1). It costs about 2d FLOPs where sorting
costs d log d, needs no parameters, and is differentiable almost everywhere
through mean and std. On Gaussian rows the count of survivors is k on average;
heavier tails leave fewer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special


def _safe_sqrt(x: jax.Array) -> jax.Array:
  """sqrt with gradient 0, not infinity, at 0."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def _quantile(k: float, count: np.ndarray | int) -> np.ndarray:
  """Q(1 - k/count) in float64, and -inf where count <= k."""
  return scipy.special.ndtri(np.maximum(1 - k / np.maximum(count, 1), 0))


def statistical_threshold(x: jax.Array, k: float, axis: int = -1, *,
                          where: jax.Array | None = None,
                          bessel: bool = False) -> jax.Array:
  """theta(x, k): the threshold that about k entries exceed.

  Args:
    x: any shape.
    k: how many entries along `axis` should exceed the threshold.
    axis: the axis of the statistics.
    where: True for the entries that count, None: all. Mean, std and d are then
      those of the counted entries alone. It has x's number of axes, and x's
      size along `axis`; elsewhere it may have 1.
    bessel: divide the variance by d - 1, not by d. The paper's text has d - 1
      and Gemma 3n, its released form, has d.

  Returns:
    The threshold in float32 or wider, `x`'s shape with 1 at `axis`. It is -inf
    where at most k entries count: then all are kept.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  count = x.shape[axis]
  if where is None:
    quantile = jnp.asarray(_quantile(k, count), x.dtype)
  else:
    # Looked up, since XLA would compute Q anew for every entry of x.
    table = jnp.asarray(_quantile(k, np.arange(count + 1)), x.dtype)
    count = where.sum(axis, keepdims=True)
    quantile = table[count]
  divisor = jnp.maximum(count, 1)
  mean = x.sum(axis, keepdims=True, where=where) / divisor
  # The squares' sum has no slope in the mean: at the mean it is at its least.
  deviation = x - jax.lax.stop_gradient(mean)
  squares = jnp.square(deviation).sum(axis, keepdims=True, where=where)
  std = _safe_sqrt(squares / jnp.maximum(count - bessel, 1))
  # Not mean + std * quantile throughout: 0 * -inf is NaN.
  finite = quantile > -jnp.inf
  theta = mean + std * jnp.where(finite, quantile, 0)
  return jnp.where(finite, theta, -jnp.inf)


def soft_threshold(x: jax.Array, theta: jax.Array,
                   huber_delta: float = 0.0) -> jax.Array:
  """max(x - theta, 0), its corner rounded over `huber_delta`; x at -inf.

  With u = x - theta and delta = `huber_delta`: 0 for u <= 0, u^2 / (2 delta)
  up to delta, u - delta / 2 above: continuously differentiable (the property
  that Theorem 3.2 of arXiv 2506.06644 claims for its Huber variant).
  """
  finite = theta > -jnp.inf
  u = jax.nn.relu(x - jnp.where(finite, theta, 0))
  if huber_delta:
    u = jnp.where(u <= huber_delta, jnp.square(u) / (2 * huber_delta),
                  u - huber_delta / 2)
  return jnp.where(finite, u, x)


def statistical_topk(x: jax.Array, k: float, axis: int = -1, *,
                     where: jax.Array | None = None, bessel: bool = False,
                     huber_delta: float = 0.0) -> jax.Array:
  """Keeps about the k largest entries along `axis`, less their threshold.

  Args:
    x: any shape and float type. Statistics are in float32 or wider.
    k: how many entries to keep. With k at least the number of entries the
      threshold would be -inf; `x` is returned as it is.
    axis: the axis to sparsify.
    where: True for the entries that count, the others come out as 0; None:
      all. See `statistical_threshold`.
    bessel: see `statistical_threshold`.
    huber_delta: see `soft_threshold`.

  Returns:
    max(x - theta(x, k), 0), of `x`'s shape and type.
  """
  theta = statistical_threshold(x, k, axis, where=where, bessel=bessel)
  y = soft_threshold(x.astype(theta.dtype), theta, huber_delta)
  if where is not None:
    y = jnp.where(where, y, 0)
  return y.astype(x.dtype)
