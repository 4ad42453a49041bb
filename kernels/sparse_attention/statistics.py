"""Statistics of a query's scores in a Hopper kernel: what it must reach.

Scores lie in shared memory, (G, 4, rows, 4): each warpgroup's 4 rows of 4 of
its first round, then of its next. They are read 8 rows at a time, a
number a lane.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels import token_attention
from sparse_lm.kernels.token_attention import (
    BY_LANE, KEYS, OWN, WARPS, Place)

ROWS = 8
# What each block sends of its keys' scores.
_MEAN, _SQUARE, _BEST, _COUNT = range(4)


def state_memory(group: int):
  """What blocks send, each its own number of 32: read whole, by warps."""
  return plgpu.SMEM((group, 4, ROWS, KEYS), jnp.float32)


def total(x: jax.Array) -> jax.Array:
  """Of (8, 4), a scalar."""
  return x.sum(1).sum(0)


def greatest(x: jax.Array) -> jax.Array:
  return jnp.max(jnp.max(x, axis=1), axis=0)


def lanes(shape) -> list[jax.Array]:
  """The index along each axis of (..., 8, 4)."""
  return [plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=BY_LANE)
          for axis in range(len(shape))]


def seen_rows(at: Place, i, part, row, key, start, end) -> jax.Array:
  """Which keys of the `i`-th 8 rows of a warpgroup are visible."""
  everyone = token_attention.span() * at.cluster
  # What is the same for each `i` by itself: it is reckoned once.
  first = (row // WARPS * everyone + row % WARPS * KEYS + key
           + (part * at.cluster + at.block) * OWN)
  slot = first + i * (ROWS // WARPS * everyone)
  return (slot >= start) & (slot < end)


def by_query(at: Place, queries: int, do: Callable[[int], None],
             first: int = 0) -> None:
  """Calls `do` with each query, the block's warpgroups in turn from `first`."""
  for g in range(queries):
    pl.when(at.part == (first + g) % token_attention.PARTS)(
        functools.partial(do, g))


def send_statistics(at: Place, score_smem, state_smem, first, last, start, end
                    ) -> None:
  """Sends all blocks the statistics of this one's, a query a warpgroup.

  Args:
    at: the warpgroup's place.
    score_smem: all scores of the block.
    state_smem: as `state_memory` makes it.
    first: which 8 rows of each warpgroup are the first with visible keys.
    last: the ones after the last.
    start: the row's first visible slot.
    end: the one after the last.
  """
  shape = token_attention.PARTS, ROWS, KEYS

  def load(g, i):
    score = mosaic_gpu.load(score_smem.at[g, :, pl.ds(i * ROWS, ROWS)],
                            BY_LANE, optimized=False)
    return score, seen_rows(at, i, *lanes(shape), start, end)

  def query(g):
    def add(i, sums):
      (score, seen), (count, one, best) = load(g, i), sums
      return (count + jnp.where(seen, 1.0, 0.0).sum(0),
              one + jnp.where(seen, score, 0.0).sum(0),
              jnp.maximum(best, jnp.max(jnp.where(seen, score, -jnp.inf),
                                        axis=0)))

    def full(x):
      return plgpu.layout_cast(jnp.full(shape[1:], x, jnp.float32), BY_LANE)

    sums = lax.fori_loop(first, last, add, (full(0.), full(0.), full(-jnp.inf)))
    count, best = total(sums[0]), greatest(sums[2])
    mean = total(sums[1]) / jnp.maximum(count, 1.0)

    def add_squares(i, square):
      score, seen = load(g, i)
      apart = score - mean
      return square + jnp.where(seen, apart * apart, 0.0).sum(0)

    square = total(lax.fori_loop(first, last, add_squares, full(0.0)))
    # A warp a number, and a lane a block.
    warp, block = token_attention.threads()
    number = functools.reduce(
        lambda x, other: jnp.where(warp == other[0], other[1], x),
        ((_SQUARE, square), (_BEST, best), (_COUNT, count)), mean)
    mosaic_gpu.send(number, block, (g * 4 + warp) * (ROWS * KEYS) + at.block,
                    state_smem)

  # The last warpgroups: others multiply their second parts meanwhile.
  by_query(at, score_smem.shape[0], query, -score_smem.shape[0])


def threshold(at: Place, state_smem, g: int, quantile, start, end):
  """A query's least kept score and its best one, scalars.

  Args: as `send_statistics` has them, and
    g: the query.
    quantile: of the scores that are not kept; -inf: all are.
  """
  row, one = lanes((ROWS, KEYS))
  number = (end - start).astype(jnp.float32)
  mean, square, best, count = (
      mosaic_gpu.load(state_smem.at[g, i], BY_LANE, optimized=False)
      for i in (_MEAN, _SQUARE, _BEST, _COUNT))
  # Nobody sends the other numbers.
  there = (row * KEYS + one < at.cluster) & (count > 0.0)
  of_all = total(jnp.where(there, count * mean, 0.0)) / number
  best = greatest(jnp.where(there, best, -jnp.inf))
  # Chan et al., 1979: squared deviations of parts, put together.
  apart = mean - of_all
  variance = total(jnp.where(there, square + count * apart * apart, 0.0)
                   ) / number
  # sqrt(variance): there is rsqrt alone.
  std = variance * lax.rsqrt(jnp.maximum(variance, 1e-37))
  # Not of -inf: 0 * -inf is NaN.
  theta = of_all + std * jnp.maximum(quantile, -1e30)
  return jnp.minimum(jnp.where(quantile > -jnp.inf, theta, -jnp.inf),
                     best), best
