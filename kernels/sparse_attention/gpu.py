"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

Three kernels. In the first each thread block takes a chunk of one key/value
head's keys, multiplies their first parts with the group's queries, and leaves
the scores and their statistics. In the second it adds all chunks' statistics
up to the threshold and asks for the second parts and values of its kept keys,
in copies that run by themselves (in small caches, of all its keys, and before
it adds); what it makes of them is a partial sum. The third adds those up, in a
fixed order: the same result every time.

`write_and_attend` takes what a layer projects a token to: the first kernel
writes its key and value to the cache.

Statistics are each warp's own, so that no warp waits for another to make them.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.token_attention import (
    CHUNK, COLUMNS, KEYS, OWN, STATE, WARPS, Queries, add_parts, add_values,
    capped, fours, in_sight, kernel, make_bounds, overlap, own_keys, products,
    seen_keys, spread, store_halves, wait_unseen)
from sparse_lm.kernels import token_attention
from sparse_lm.kernels.sparse_attention.predictor import quantiles

# Keys that are copied together.
_GROUP = 4
# In caches of so many slots all keys are copied, before it is known which are
# visible and kept: the wait for that takes longer.
_EAGER_UP_TO = 2048
# What each warp leaves of its keys' scores, and of their weights.
_MEAN, _SQUARE, _BEST = range(3)
_WEIGHT, _COUNT = range(2)


def unsupported(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array
                ) -> str | None:
  """As `api.unsupported`."""
  e, p = query_BxKxGxE.shape[-1], key1_BxKxSxP.shape[-1]
  for name, size in (("P", p), ("E - P", e - p), ("E", e)):
    if size % 128 or not 0 < size <= COLUMNS:
      return f"{name} of {size} is not 128 or 256"
  return token_attention.unsupported(
      (query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE),
      query_BxKxGxE.shape[2])


def _score_chunk(heads, group, write, eager, bounds_gmem, rows_gmem,
                 rotary_gmem, key1_gmem, key2_gmem, value_gmem, score_gmem,
                 state_gmem, *, key_smem, barrier) -> None:
  """Scores of a chunk of keys, and their statistics.

  Args:
    heads: key/value heads.
    group: queries of each.
    write: whether to turn the rows and write the newest; not `rotary_gmem`
      nor what follows the queries is read otherwise.
    eager: whether to copy keys before it is known whether they are visible.
    bounds_gmem: as `make_bounds` makes them.
    rows_gmem: as `Queries` has it.
    rotary_gmem: likewise.
    key1_gmem: (heads, S / 16, 16, P).
    key2_gmem: (heads, S / 16, 16, U).
    value_gmem: (heads, S / 16, 16, E).
    score_gmem: written, (heads, G, S / 16, 16).
    state_gmem: written, (heads, G, 3, S / 16).
    key_smem: first parts of the chunk.
    barrier: when they are there.
  """
  queries = Queries(rows_gmem, rotary_gmem if write else None, heads, group)
  head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
  own, width = pl.ds(chunk * WARPS, WARPS), key1_gmem.shape[-1]

  def copy():
    plgpu.copy_gmem_to_smem(key1_gmem.at[head, own], key_smem, barrier)

  def load():
    query = [queries.query(g, 0, width) for g in range(group)]
    # The newest in every block: one that had it to load later would be last.
    return query, queries.newest([width, key2_gmem.shape[-1]]) if write else ()

  if eager:
    copy()
    loaded = load()
  start, end, visible = in_sight(bounds_gmem, queries.row, chunk)
  newest = bounds_gmem[queries.row, 2]

  def write_newest(key1, key2, value):
    warp, slot = newest // OWN, newest % OWN
    for gmem, x in ((key1_gmem, key1), (key2_gmem, key2), (value_gmem, value)):
      store_halves(gmem.at[head, warp, slot], x)
    store_halves(key_smem.at[warp % WARPS, slot], key1)
    plgpu.commit_smem()

  @pl.when(visible)
  def _():
    if not eager:
      copy()
    query, token = loaded if eager else load()
    plgpu.barrier_wait(barrier)
    if write:
      pl.when(newest // CHUNK == chunk)(lambda: write_newest(*token))
    seen = seen_keys(start, end)
    layout = KEYS.reduce((1, 2))
    warp = plgpu.broadcasted_iota(jnp.int32, (WARPS,), 0, layout=layout)
    count = overlap(start, end, warp + chunk * WARPS)
    for g in range(group):
      score = products(key_smem, query[g])
      mosaic_gpu.store(score_gmem.at[head, g, own], score)
      mean = jnp.where(seen, score, 0.0).sum(1) / jnp.maximum(count, 1.0)
      apart = score - spread(mean, score.shape, (0,), KEYS.reduce(2))
      square = jnp.where(seen, apart * apart, 0.0).sum(1)
      best = jnp.max(jnp.where(seen, score, -jnp.inf), axis=1)
      for i, x in ((_MEAN, mean), (_SQUARE, square), (_BEST, best)):
        mosaic_gpu.store(state_gmem.at[head, g, i, own], x)

  if eager:
    wait_unseen(visible, [barrier])


def _softplus(x: jax.Array) -> jax.Array:
  small = jnp.exp(-jnp.abs(x))
  # There is no log1p; its series where 1 + small is too coarse.
  series = small * (1.0 - small * (0.5 - small * (1 / 3)))
  return jnp.maximum(x, 0.0) + jnp.where(small < 0.01, series,
                                         jnp.log(1.0 + small))


def _threshold(state, quantile, start, end):
  """A query's least kept score and its best one, scalars."""
  mean, square, best = state
  part = plgpu.broadcasted_iota(jnp.int32, mean.shape, 0, layout=STATE)
  count = overlap(start, end, part)
  total = (end - start).astype(jnp.float32)
  # What stands where no key is visible was never written.
  there = count > 0.0
  mean_of_all = jnp.where(there, count * mean, 0.0).sum() / total
  # Chan et al., 1979: squared deviations of parts, put together.
  apart = mean - mean_of_all
  square = jnp.where(there, square + count * apart * apart, 0.0).sum()
  best = jnp.max(jnp.where(there, best, -jnp.inf))
  variance = square / total
  # sqrt(variance): there is rsqrt alone.
  std = variance * lax.rsqrt(jnp.maximum(variance, 1e-37))
  # Not of -inf: 0 * -inf is NaN.
  theta = mean_of_all + std * jnp.maximum(quantile, -1e30)
  theta = jnp.where(quantile > -jnp.inf, theta, -jnp.inf)
  return jnp.minimum(theta, best), best


def _mix_scratch(group: int, eager: bool, key2_gmem, value_gmem) -> dict:
  """Shared memory of `_mix_chunk`."""
  def rows(gmem):
    return plgpu.SMEM((WARPS, OWN, gmem.shape[-1]), jnp.bfloat16)

  copies = 1 if eager else CHUNK // _GROUP
  return dict(
      kept_smem=plgpu.SMEM((WARPS, OWN), jnp.int32),
      weight_smem=plgpu.SMEM((group, WARPS, OWN), jnp.float32),
      key2_smem=rows(key2_gmem), value_smem=rows(value_gmem),
      key2_barrier=plgpu.Barrier(num_arrivals=copies),
      value_barrier=plgpu.Barrier(num_arrivals=copies))


def _mix_chunk(heads, group, write, eager, softcap, bounds_gmem, rows_gmem,
               rotary_gmem, quantile_gmem, key2_gmem, value_gmem, score_gmem,
               state_gmem, part_gmem, sum_gmem, *, kept_smem, weight_smem,
               key2_smem, value_smem, key2_barrier, value_barrier) -> None:
  """The kept keys' part of the queries' results.

  Args: as `_score_chunk` has them, and
    eager: whether to copy all keys of the chunk, before it is known which are
      kept.
    softcap: of the logits.
    quantile_gmem: each row's, (B,).
    part_gmem: written, (heads, G, chunks / 4, 4, E) in float32: not divided.
    sum_gmem: written, (heads, G, 2, S / 16): the divisors, and counts.
    kept_smem: how many queries keep each key.
    weight_smem: their weights; below 0 where a key is not kept.
    key2_smem: second parts of the kept keys.
    value_smem: their values.
    key2_barrier: when those are there.
    value_barrier: when these are.
  """
  queries = Queries(rows_gmem, rotary_gmem if write else None, heads, group)
  head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
  own = pl.ds(chunk * WARPS, WARPS)
  barriers = key2_barrier, value_barrier
  rows = list(zip((key2_gmem, value_gmem), (key2_smem, value_smem), barriers))

  def load(g):
    """A query's second part, and what the first kernel has left of it."""
    width = key2_gmem.shape[-1]
    query = queries.query(g, rows_gmem.shape[-1] - width, width)
    score = mosaic_gpu.load(score_gmem.at[head, g, own], KEYS.reduce(2),
                            optimized=False)
    return query, score, [mosaic_gpu.load(state_gmem.at[head, g, i], STATE,
                                          optimized=False)
                          for i in (_MEAN, _SQUARE, _BEST)]

  if eager:
    for gmem, smem, barrier in rows:
      plgpu.copy_gmem_to_smem(gmem.at[head, own], smem, barrier)
    loaded = [load(g) for g in range(group)]
  start, end, visible = in_sight(bounds_gmem, queries.row, chunk)

  def weigh(score, state, seen):
    """A query's weights before the second parts, and 1 for its kept keys."""
    least, best = _threshold(state, quantile_gmem[queries.row], start, end)
    weight = jnp.exp(capped(score, softcap) - capped(best, softcap))
    # A score that is NaN is kept, and so are all where `least` is.
    kept = jnp.where(seen, jnp.where(score < least, 0, 1), 0)
    return jnp.where(kept > 0, weight, -1.0), kept

  def ask(i, kept):
    """Starts the copies of a group of keys if one is kept."""
    warp, first = i // (OWN // _GROUP), i % (OWN // _GROUP) * _GROUP

    @pl.when(kept > 0)
    def _():
      four = pl.ds(first, _GROUP)
      for gmem, smem, barrier in rows:
        plgpu.copy_gmem_to_smem(gmem.at[head, chunk * WARPS + warp, four],
                                smem.at[warp, four], barrier)

    @pl.when(kept == 0)
    def _():
      for barrier in barriers:
        plgpu.barrier_arrive(barrier)

  def ask_for(kept):
    """Starts the copies of the keys that a query keeps."""
    kept_smem[...] = sum(kept[1:], kept[0])
    plgpu.commit_smem()
    flags = [[kept_smem[i // OWN, i % OWN] for i in range(j, j + _GROUP)]
             for j in range(0, CHUNK, _GROUP)]
    for i, flag in enumerate(flags):
      ask(i, sum(flag[1:], flag[0]))

  def mix(query, weights):
    plgpu.barrier_wait(key2_barrier)
    for g, weight in enumerate(weights):
      # What no copy has filled may hold anything: it is not selected.
      second = _softplus(products(key2_smem, query[g]))
      weight_smem[g] = jnp.where(weight < 0.0, weight, weight * second)
    plgpu.commit_smem()
    plgpu.barrier_wait(value_barrier)
    add_values(weight_smem, value_smem, lambda g: part_gmem.at[head, g])

  @pl.when(visible)
  def _():
    seen = seen_keys(start, end)
    # All loads are on their way before the first is needed.
    query, *left = zip(*(loaded if eager else
                         [load(g) for g in range(group)]))
    weights, kept = zip(*(weigh(*x, seen) for x in zip(*left)))
    if not eager:
      ask_for(kept)
    for g in range(group):
      one = jnp.where(weights[g] < 0.0, 0.0, weights[g]), kept[g]
      for i, x in zip((_WEIGHT, _COUNT), one):
        mosaic_gpu.store(sum_gmem.at[head, g, i, own],
                         x.astype(jnp.float32).sum(1))
    mix(query, weights)

  if eager:
    wait_unseen(visible, barriers)


def _join_chunks(heads, bounds_gmem, part_gmem, sum_gmem, y_gmem, count_gmem
                 ) -> None:
  """A query's result, from all chunks in sight; how many keys it keeps.

  Args: as `_mix_chunk` has them, and
    y_gmem: written, (heads, G, E).
    count_gmem: written, (heads, G), int32.
  """
  head, g = lax.axis_index("head"), lax.axis_index("query")
  row = head // heads
  start, end, _ = in_sight(bounds_gmem, row, 0)
  weight, count = (
      mosaic_gpu.load(sum_gmem.at[head, g, i], STATE, optimized=False)
      for i in (_WEIGHT, _COUNT))
  total = add_parts(part_gmem.at[head, g], start, end)
  warp = plgpu.broadcasted_iota(jnp.int32, weight.shape, 0, layout=STATE)
  there = overlap(start, end, warp) > 0.0
  divisor = jnp.where(there, weight, 0.0).sum()
  mosaic_gpu.store(y_gmem.at[head, g],
                   (total.sum(0) / divisor).astype(y_gmem.dtype))
  count_gmem[head, g] = jnp.where(there, count, 0.0).sum().astype(jnp.int32)


def _attend(write, rows_BxRxE, rotary_Bx2xT, caches, bounds_Bx3, group, top_k,
            logit_softcap):
  """The kernels, one after the other.

  Args:
    write: as `_score_chunk` has it.
    rows_BxRxE: as `Queries` has them.
    rotary_Bx2xT: likewise.
    caches: first parts, second parts and values, each (B, K, S, width).
    bounds_Bx3: as `make_bounds` makes it.
    group: query heads per key/value head.
    top_k: as `api.sparse_attention` has it, like `logit_softcap`.
    logit_softcap: of the scores that the softmax sees.

  Returns:
    Results (B, K, G, E), counts (B, K, G), and the caches as they are then.
  """
  b, k, s, width = caches[2].shape
  eager = s <= _EAGER_UP_TO
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  # Read whole, by warps: a multiple of their lanes.
  warps, heads = 32 * pl.cdiv(s // OWN, 32), (b * k, group)
  grid = dict(head=b * k, chunk=s // CHUNK)
  inputs = bounds_Bx3, rows_BxRxE, rotary_Bx2xT
  keys = [own_keys(x) for x in caches]
  if write:
    keys = [jax.new_ref(x) for x in keys]
  scores, states = kernel(
      functools.partial(_score_chunk, k, group, write, eager),
      (f32((*heads, s // OWN, OWN)), f32((*heads, 3, warps))), grid,
      key_smem=plgpu.SMEM((WARPS, OWN, caches[0].shape[-1]), jnp.bfloat16),
      barrier=plgpu.Barrier())(*inputs, *keys)
  if write:
    keys = [jax.freeze(x) for x in keys]
  quantile_B = quantiles(bounds_Bx3[:, 1] - bounds_Bx3[:, 0], s, top_k)
  parts, sums = kernel(
      functools.partial(_mix_chunk, k, group, write, eager, logit_softcap),
      (f32((*heads, fours(s // CHUNK), 4, width)), f32((*heads, 2, warps))),
      grid, **_mix_scratch(group, eager, *keys[1:]))(
          *inputs, quantile_B, *keys[1:], scores, states)
  y, counts = kernel(
      functools.partial(_join_chunks, k),
      (jax.ShapeDtypeStruct((*heads, width), rows_BxRxE.dtype),
       jax.ShapeDtypeStruct(heads, jnp.int32)),
      dict(head=b * k, query=group))(bounds_Bx3, parts, sums)
  return (y.reshape(b, k, group, width), counts.reshape(b, k, group),
          [x.reshape(c.shape) for x, c in zip(keys, caches)])


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int, top_k: int,
                     logit_softcap: float) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_attention`; what it serves, `unsupported` says."""
  b, k, g, e = query_BxKxGxE.shape
  bounds_Bx3 = make_bounds(lengths_B, window, key1_BxKxSxP.shape[2])
  # There is nothing to turn.
  rotary_Bx2xT = jnp.zeros((b, 2, e // 2), jnp.float32)
  return _attend(False, query_BxKxGxE.reshape(b, k * g, e), rotary_Bx2xT,
                 (key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE), bounds_Bx3, g,
                 top_k, logit_softcap)[:2]


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
                     value_BxKxSxE: jax.Array, lengths_B: jax.Array, *,
                     window: jax.Array | int, top_k: int, logit_softcap: float
                     ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """One token: its key and value are written, then its queries attend.

  Args:
    rows_BxRxE: what a layer projects its token to, R = K G + 2 K rows: queries,
      keys and values, none turned to its position.
    rotary_Bx2xT: cosine and sine of the angle of each pair of dims, T = E / 2:
      i of the first part and P / 2 + i, then those of the second part. The
      first part's pairs come first.
    key1_BxKxSxP: as `api.sparse_attention` has it, like what follows.
    key2_BxKxSxU: the second parts.
    value_BxKxSxE: the values.
    lengths_B: filled positions, the token's included: it is written to the
      last one, unless that is beyond the slots.
    window: how many tokens the query sees.
    top_k: about how many keys it keeps.
    logit_softcap: of the softmax.

  Returns:
    As `api.sparse_attention`, and the three arrays of the cache, written in
    place where they are not used again.
  """
  group = rows_BxRxE.shape[1] // value_BxKxSxE.shape[1] - 2
  bounds_Bx3 = make_bounds(lengths_B, window, key1_BxKxSxP.shape[2])
  return _attend(True, rows_BxRxE, rotary_Bx2xT,
                 (key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE), bounds_Bx3,
                 group, top_k, logit_softcap)
