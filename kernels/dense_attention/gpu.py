"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

One kernel: each warp weighs its keys by their own maximum and adds their values
up, then blocks and clusters join what warps have. XLA takes eight kernels.
"""

import dataclasses
import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels import token_attention
from sparse_lm.kernels.token_attention import (
    BY_COLUMN, BY_KEY, KEYS, OWN, WARPS, Place, add_values, block_sync, capped,
    cluster_size, fetch_rows, join, join_memory, kernel, make_bounds, no_values,
    own_keys, products, read_queries, rows_memory, spread, start_copies,
    store_row)

# Copies of a warpgroup that are on their way.
_STAGES = 2
# Below any logit: no two such differ by NaN, as two of -inf do.
_LOWEST = float(np.finfo(np.float32).min)


def unsupported(query_BxKxGxE: jax.Array, key_BxKxSxE: jax.Array) -> str | None:
  """As `api.unsupported`."""
  width, group = query_BxKxGxE.shape[-1], query_BxKxGxE.shape[2]
  if width not in (128, 256):
    return f"E of {width} is not 128 or 256"
  return token_attention.unsupported((query_BxKxGxE, key_BxKxSxE), group)


@dataclasses.dataclass(frozen=True)
class _Memory:
  """The kernel's arrays, in global and shared memory.

  Attributes:
    bounds_gmem: as `make_bounds` makes them.
    rows_gmem: as `fetch_rows` has it.
    rotary_gmem: likewise.
    key_gmem: (heads, S / 16, 4, 4, E).
    value_gmem: likewise.
    y_gmem: written, (heads, G, E).
    query_smem: as `rows_memory` makes it.
    newest_smem: likewise.
    key_smem: each warpgroup's keys, of some rounds.
    value_smem: their values.
    weight_smem: their weights, of two rounds; below 0 where none is visible.
    scale_smem: what each warp's total so far is to be multiplied with.
    key_barrier: when the keys are there.
    value_barrier: when the values are.
    part_smem: as `join_memory` makes it, like all whose names are there.
  """

  bounds_gmem: jax.Array
  rows_gmem: jax.Array
  rotary_gmem: jax.Array
  key_gmem: jax.Array
  value_gmem: jax.Array
  y_gmem: jax.Array
  query_smem: jax.Array
  newest_smem: jax.Array
  key_smem: jax.Array
  value_smem: jax.Array
  weight_smem: jax.Array
  scale_smem: jax.Array
  key_barrier: jax.Array
  value_barrier: jax.Array
  part_smem: jax.Array
  sum_smem: jax.Array
  all_part_smem: jax.Array
  all_sum_smem: jax.Array
  block_barrier: jax.Array


def _scratch(group: int, width: int) -> dict:
  """Shared memory, by `_Memory`'s names."""
  parts = token_attention.PARTS
  rows = plgpu.SMEM((parts, _STAGES, WARPS, KEYS, width), jnp.bfloat16)
  barrier = plgpu.Barrier(num_barriers=parts * _STAGES)
  return rows_memory(group, width) | dict(
      key_smem=rows, value_smem=rows,
      weight_smem=plgpu.SMEM((2, parts, group, WARPS, KEYS), jnp.float32),
      scale_smem=plgpu.SMEM((2, parts, group, WARPS), jnp.float32),
      key_barrier=barrier, value_barrier=barrier)


class _Warpgroup:
  """What a warpgroup does with its keys, round by round."""

  def __init__(self, at: Place, m: _Memory, group: int, softcap: float):
    self.at, self.m, self.group, self.softcap = at, m, group, softcap
    # Where rows are, where they are copied to, and the newest.
    self.keys = m.key_gmem, m.key_smem, m.key_barrier, m.newest_smem.at[0]
    self.values = (m.value_gmem, m.value_smem, m.value_barrier,
                   m.newest_smem.at[1])

  def copy(self, i) -> None:
    """Starts the copies of round `i`."""
    at, stage = self.at, i % _STAGES
    for gmem, smem, barrier, _ in self.keys, self.values:
      plgpu.copy_gmem_to_smem(
          gmem.at[at.head, at.sixteen(i)], smem.at[at.part, stage],
          barrier.at[at.part * _STAGES + stage])

  def wait(self, i, newest, gmem, smem, barrier, row_smem) -> None:
    """Waits for a copy, and writes the newest row if it is one of these."""
    at, stage = self.at, i % _STAGES
    plgpu.barrier_wait(barrier.at[at.part * _STAGES + stage])

    @pl.when(newest // OWN == at.sixteen(i))
    def _():
      slot = newest // KEYS % WARPS, newest % KEYS
      store_row(row_smem, smem.at[at.part, stage, *slot],
                gmem.at[at.head, newest // OWN, *slot])
      plgpu.commit_smem()

  def start(self):
    """Sums of no keys: maxima, divisors and totals."""
    def each(x):
      return [plgpu.layout_cast(jnp.full((WARPS,), x, jnp.float32),
                                BY_KEY.reduce((1, 2)))] * self.group

    return (each(_LOWEST), each(0.0),
            no_values(self.group, self.m.y_gmem.shape[-1]))

  def weigh(self, i, seen, product, best, divisor, g: int):
    """Leaves a query's weights; returns its maxima and divisors."""
    at, m = self.at, self.m
    logit = capped(product, self.softcap)
    greatest = jnp.maximum(
        best, jnp.max(jnp.where(seen, logit, _LOWEST), axis=1))
    weight = jnp.exp(logit - spread(greatest, logit.shape, (0,),
                                    BY_KEY.reduce(2)))
    scale = jnp.exp(best - greatest)
    mosaic_gpu.store(m.weight_smem.at[i % 2, at.part, g],
                     jnp.where(seen, weight, -1.0))
    mosaic_gpu.store(m.scale_smem.at[i % 2, at.part, g], scale)
    return greatest, divisor * scale + jnp.where(seen, weight, 0.0).sum(1)

  def scaled(self, i, total, g: int):
    scale = mosaic_gpu.load(self.m.scale_smem.at[i % 2, self.at.part, g],
                            BY_COLUMN.reduce((1, 2)), optimized=False)
    return total * spread(scale, total.shape, (0,), BY_COLUMN.reduce(1))

  def add(self, i, sums, first, last, start, end, newest):
    """Adds the keys of round `i` to the sums."""
    at, m, queries = self.at, self.m, range(self.group)
    self.wait(i, newest, *self.keys)
    seen = at.seen(i, start, end)
    logits = products(m.key_smem.at[at.part, i % _STAGES],
                      read_queries(m.query_smem))
    bests, divisors = zip(*(
        self.weigh(i, seen, logits[g], sums[0][g], sums[1][g], g)
        for g in queries))
    plgpu.commit_smem()
    # By now no warp reads what the round before has read.
    pl.when((i > first) & (i + _STAGES - 1 < last))(
        lambda: self.copy(i + _STAGES - 1))
    self.wait(i, newest, *self.values)
    totals = add_values([self.scaled(i, sums[2][g], g) for g in queries],
                        m.weight_smem.at[i % 2, at.part],
                        m.value_smem.at[at.part, i % _STAGES])
    return list(bests), list(divisors), totals


def _attend(heads, cluster, group, softcap, *refs, **scratch) -> None:
  """A head's results.

  Args:
    heads: key/value heads of a row.
    cluster: blocks of each.
    group: queries of each.
    softcap: of the logits.
    *refs: as `_Memory` has them.
    **scratch: likewise.
  """
  at, m = Place(heads, cluster), _Memory(*refs, **scratch)
  mine = _Warpgroup(at, m, group, softcap)
  put_rows = fetch_rows(at, group, [m.y_gmem.shape[-1]], m.rows_gmem,
                        m.rotary_gmem)
  start, end, newest = (m.bounds_gmem[at.row, i] for i in range(3))
  first, last = start_copies(at, m.key_gmem.shape[1] * OWN, _STAGES,
                             start, end, mine.copy)
  put_rows(m.query_smem, m.newest_smem)
  block_sync(m.block_barrier)
  bests, divisors, totals = lax.fori_loop(
      first, last, lambda i, sums: mine.add(i, sums, first, last, start, end,
                                            newest), mine.start())

  def finish(g, first, total, divisor, _):
    mosaic_gpu.store(m.y_gmem.at[at.head, g, pl.ds(first, total.shape[0])],
                     (total / divisor).astype(m.y_gmem.dtype))

  join(at, m, totals, list(zip(divisors, bests)), finish, rescale=True)


# Lowered once for all layers.
@functools.partial(jax.jit, static_argnums=(5, 6))
def _call(rows_BxRxE, rotary_Bx2xT, key_BxKxSxE, value_BxKxSxE, bounds_Bx3,
          group, logit_softcap):
  """The kernel, of bounds that `make_bounds` makes."""
  b, k, s, width = key_BxKxSxE.shape
  cluster = cluster_size(b * k, s)
  caches = [jax.new_ref(own_keys(x)) for x in (key_BxKxSxE, value_BxKxSxE)]
  y = kernel(
      functools.partial(_attend, k, cluster, group, logit_softcap),
      jax.ShapeDtypeStruct((b * k, group, width), rows_BxRxE.dtype),
      b * k, cluster, **_scratch(group, width),
      **join_memory(group, width, cluster))(
          bounds_Bx3, rows_BxRxE, rotary_Bx2xT, *caches)
  return (y.reshape(b, k, group, width),
          [jax.freeze(x).reshape(key_BxKxSxE.shape) for x in caches])


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key_BxKxSxE: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int,
                     logit_softcap: float
                     ) -> tuple[jax.Array, list[jax.Array]]:
  """As `api.write_and_attend`; what it serves, `unsupported` says."""
  group = rows_BxRxE.shape[1] // key_BxKxSxE.shape[1] - 2
  bounds_Bx3 = make_bounds(lengths_B, window, key_BxKxSxE.shape[2])
  return _call(rows_BxRxE, rotary_Bx2xT, key_BxKxSxE, value_BxKxSxE,
               bounds_Bx3, group, logit_softcap)
