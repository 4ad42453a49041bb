"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

Two kernels. In the first each thread block weighs a chunk of one key/value
head's keys by their own maximum and adds their values up; the second joins the
chunks. XLA takes eight kernels.
"""

import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental import pallas as pl
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels import token_attention
from sparse_lm.kernels.token_attention import (
    CHUNK, COLUMNS, OWN, PARTIAL, WARPS, Queries, add_parts,
    add_values, capped, chunks_there, fours, in_sight, kernel, make_bounds,
    own_keys, products, seen_keys, store_halves, wait_unseen)

# In caches of so many slots keys are copied before it is known which are
# visible: the wait for that takes longer.
_EAGER_UP_TO = 1024
# What a chunk leaves beside its part of the values.
_BEST, _WEIGHT = range(2)


def unsupported(query_BxKxGxE: jax.Array, key_BxKxSxE: jax.Array) -> str | None:
  """As `api.unsupported`."""
  width, group = query_BxKxGxE.shape[-1], query_BxKxGxE.shape[2]
  if width not in (128, COLUMNS):
    return f"E of {width} is not 128 or 256"
  return token_attention.unsupported((query_BxKxGxE, key_BxKxSxE), group)


def _mix_chunk(heads, group, softcap, eager, bounds_gmem, rows_gmem,
               rotary_gmem, key_gmem, value_gmem, part_gmem, sum_gmem, *,
               key_smem, value_smem, weight_smem, key_barrier,
               value_barrier) -> None:
  """A chunk's part of the group's results.

  Args:
    heads: key/value heads.
    group: queries of each.
    softcap: of the logits.
    eager: whether to copy keys before it is known whether they are visible.
    bounds_gmem: as `make_bounds` makes them.
    rows_gmem: as `Queries` has it.
    rotary_gmem: likewise.
    key_gmem: (heads, S / 16, 16, E).
    value_gmem: likewise.
    part_gmem: written, (heads, G, chunks / 4, 4, E) in float32: not divided.
    sum_gmem: written, (2, heads, G, chunks / 4, 4): the greatest logit, and
      the divisor.
    key_smem: the chunk's keys.
    value_smem: its values.
    weight_smem: its weights; below 0 where a key is not visible.
    key_barrier: when the keys are there.
    value_barrier: when the values are.
  """
  queries = Queries(rows_gmem, rotary_gmem, heads, group)
  head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
  own, width = pl.ds(chunk * WARPS, WARPS), key_gmem.shape[-1]
  barriers = key_barrier, value_barrier

  def copy():
    for gmem, smem, barrier in zip((key_gmem, value_gmem),
                                   (key_smem, value_smem), barriers):
      plgpu.copy_gmem_to_smem(gmem.at[head, own], smem, barrier)

  def load():
    # The newest in every block: one that had it to load later would be last.
    return ([queries.query(g, 0, width) for g in range(group)],
            queries.newest([width]))

  if eager:
    copy()
    loaded = load()
  start, end, visible = in_sight(bounds_gmem, queries.row, chunk)
  newest = bounds_gmem[queries.row, 2]

  def write_newest(key, value):
    warp, slot = newest // OWN, newest % OWN
    plgpu.barrier_wait(value_barrier)
    for gmem, smem, x in ((key_gmem, key_smem, key),
                          (value_gmem, value_smem, value)):
      store_halves(gmem.at[head, warp, slot], x)
      store_halves(smem.at[warp % WARPS, slot], x)
    plgpu.commit_smem()

  @pl.when(visible)
  def _():
    if not eager:
      copy()
    query, token = loaded if eager else load()
    plgpu.barrier_wait(key_barrier)
    pl.when(newest // CHUNK == chunk)(lambda: write_newest(*token))
    seen = seen_keys(start, end)
    for g in range(group):
      logit = capped(products(key_smem, query[g]), softcap)
      best = jnp.max(jnp.max(jnp.where(seen, logit, -jnp.inf), axis=1))
      weight = jnp.where(seen, jnp.exp(logit - best), 0.0)
      weight_smem[g] = jnp.where(seen, weight, -1.0)
      sum_gmem[_BEST, head, g, chunk // 4, chunk % 4] = best
      sum_gmem[_WEIGHT, head, g, chunk // 4, chunk % 4] = weight.sum(1).sum()
    plgpu.commit_smem()
    pl.when(newest // CHUNK != chunk)(
        lambda: plgpu.barrier_wait(value_barrier))
    add_values(weight_smem, value_smem, lambda g: part_gmem.at[head, g])

  if eager:
    wait_unseen(visible, barriers)


def _join_chunks(heads, bounds_gmem, part_gmem, sum_gmem, y_gmem) -> None:
  """A query's result, from all chunks in sight.

  Args: as `_mix_chunk` has them, and
    y_gmem: written, (heads, G, E).
  """
  head, g = lax.axis_index("head"), lax.axis_index("query")
  start, end, _ = in_sight(bounds_gmem, head // heads, 0)
  there = chunks_there(0, part_gmem.shape[2], start, end)
  best, weight = (
      mosaic_gpu.load(sum_gmem.at[i, head, g], PARTIAL.reduce(2),
                      optimized=False) for i in (_BEST, _WEIGHT))
  best = jnp.where(there, best, -jnp.inf)
  greatest = jnp.max(jnp.max(best, axis=0))
  divisor = jnp.where(there, jnp.exp(best - greatest) * weight, 0.0).sum(0)

  def factor(rows):
    best = mosaic_gpu.load(sum_gmem.at[_BEST, head, g, rows],
                           PARTIAL.reduce(2), optimized=False)
    return jnp.exp(best - greatest)

  total = add_parts(part_gmem.at[head, g], start, end, factor)
  mosaic_gpu.store(y_gmem.at[head, g],
                   (total.sum(0) / divisor.sum()).astype(y_gmem.dtype))


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key_BxKxSxE: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, group: int,
                     window: jax.Array | int, logit_softcap: float
                     ) -> tuple[jax.Array, list[jax.Array]]:
  """As `api.write_and_attend`."""
  b, k, s, width = key_BxKxSxE.shape
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  heads, count = (b * k, group), fours(s // CHUNK)
  rows = plgpu.SMEM((WARPS, OWN, width), jnp.bfloat16)
  bounds_Bx3 = make_bounds(lengths_B, window, s)
  caches = [jax.new_ref(own_keys(x)) for x in (key_BxKxSxE, value_BxKxSxE)]
  parts, sums = kernel(
      functools.partial(_mix_chunk, k, group, logit_softcap,
                        s <= _EAGER_UP_TO),
      (f32((*heads, count, 4, width)), f32((2, *heads, count, 4))),
      dict(head=b * k, chunk=s // CHUNK), key_smem=rows, value_smem=rows,
      weight_smem=plgpu.SMEM((group, WARPS, OWN), jnp.float32),
      key_barrier=plgpu.Barrier(), value_barrier=plgpu.Barrier())(
          bounds_Bx3, rows_BxRxE, rotary_Bx2xT, *caches)
  y, = kernel(
      functools.partial(_join_chunks, k),
      (jax.ShapeDtypeStruct((*heads, width), rows_BxRxE.dtype),),
      dict(head=b * k, query=group))(bounds_Bx3, parts, sums)
  return (y.reshape(b, k, group, width),
          [jax.freeze(x).reshape(key_BxKxSxE.shape) for x in caches])
