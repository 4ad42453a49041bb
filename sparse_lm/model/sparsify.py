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

The exact operators keep entries as they are: `topk`, `approx_topk`,
`block_topk`, and Q-Sparse's `sparsify_input`, by magnitude.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import LinearInputsConfig
from sparse_lm.kernels.gaussian import quantile as gaussian_quantile
from sparse_lm.model.sharding import per_batch_shard


def _safe_sqrt(x: jax.Array) -> jax.Array:
  """sqrt with gradient 0, not infinity, at 0."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


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
    quantile = jnp.asarray(gaussian_quantile(k, count), x.dtype)
  else:
    # Looked up, since XLA would compute Q anew for every entry of x.
    table = jnp.asarray(gaussian_quantile(k, np.arange(count + 1)), x.dtype)
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


def topk_mask(x: jax.Array, k: int) -> jax.Array:
  """True for the k largest entries of the last axis; of equals the first.

  Args:
    x: any shape; on a mesh its first axis is the batch.
    k: at most the size of the last axis; exactly so many are True, and every
      NaN, so that none is lost.
  """
  def mask(x):
    kth = jax.lax.top_k(x, k)[0][..., -1:]
    above, tied = ~(x <= kth), x == kth
    room = k - above.sum(-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= room))

  return per_batch_shard(mask, jax.lax.stop_gradient(x))


def topk(x: jax.Array, k: int) -> jax.Array:
  """Keeps the k largest entries of the last axis as they are, 0 elsewhere.

  The gradient reaches the entries that are kept, and no other.
  """
  return jnp.where(topk_mask(x, k), x, 0)


def approx_topk(x: jax.Array, k: int, recall: float) -> jax.Array:
  """`topk` by `jax.lax.approx_max_k`: k entries, most of them the largest.

  Args:
    x: any shape.
    k: how many are kept.
    recall: the fraction of the k largest that is expected among them. TPUs
      trade it for speed; other backends are exact.
  """
  def mask(x):
    _, kept = jax.lax.approx_max_k(x, k, recall_target=recall)
    return jnp.put_along_axis(jnp.zeros(x.shape, bool), kept, True, axis=-1,
                              inplace=False)

  return jnp.where(per_batch_shard(mask, jax.lax.stop_gradient(x)), x, 0)


def block_topk(x: jax.Array, k: int, block_size: int) -> jax.Array:
  """`topk` within each block of neighbours: the k-of-`block_size` pattern.

  Mixture-of-Channels has 2 of 8.

  Args:
    x: the last axis must be a multiple of `block_size`.
    k: how many of each block are kept.
    block_size: how many neighbours are a block.
  """
  blocks = x.reshape(*x.shape[:-1], -1, block_size)
  return topk(blocks, k).reshape(x.shape)


def sparsify_input(x: jax.Array, config: LinearInputsConfig,
                   axes: int = 1) -> jax.Array:
  """A linear map's input with its smallest entries dropped (Q-Sparse).

  arXiv 2407.10969, Section 2.1: Y = (X * M) W', M the top-k mask of |X|, what
  is kept divided by its L2 norm. Where the paper is silent: the norm is
  divided by the square root of the width, so that entries stay of order 1 as
  the initialisation by fan-in expects, and is differentiated through. With
  `straight_through` the gradient of x is that of X * M at every entry; without
  it, at the kept ones alone.

  Args:
    x: any float type; the norm is in float32.
    config: k, the pattern, and the two switches.
    axes: how many of x's last axes are one input.

  Returns:
    An array of x's shape and type; x itself where the sparsifier is "none".
  """
  if config.sparsifier == "none":
    return x
  flat = x.reshape(*x.shape[:x.ndim - axes], -1)
  size = jnp.abs(flat)
  if config.sparsifier == "block_topk":
    blocks = size.reshape(*size.shape[:-1], -1, config.block_size)
    mask = topk_mask(blocks, config.num_active(config.block_size))
    mask = mask.reshape(flat.shape)
  else:
    mask = topk_mask(size, config.num_active(flat.shape[-1]))
  kept = jnp.where(mask, flat, 0)
  if config.straight_through:
    kept = flat + jax.lax.stop_gradient(kept - flat)  # Exact: x - x is 0.
  if config.rescale:
    wide = kept.astype(jnp.float32)
    mean_square = jnp.square(wide).mean(-1, keepdims=True)
    kept = (wide * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype)
  return kept.reshape(x.shape)
