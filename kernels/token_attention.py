"""What Hopper kernels of attention from one token to its cache share.

One kernel for all, on clusters of thread blocks: another kernel takes longer
to start than a cluster takes to exchange sums. A cluster has a key/value head.
Round by round each of its warpgroups takes 16 of that head's keys, a warp 4 of
those. No warp waits for another before its own keys are done.

A block turns its head's queries, and the newest key, to their position; the
warpgroup whose keys the newest is one of writes it and its value to the cache,
in place. XLA needs three kernels for that alone.

Sums across warps never go through reductions: the memory Mosaic GPU does those
in is shared by a block's warpgroups.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu

# Warpgroups of a block, warps of each, and a warp's keys of a round. Caches are
# often a little longer than a power of two: with five, that is no more rounds.
PARTS, WARPS, KEYS = 5, 4, 4
OWN = WARPS * KEYS
# Blocks that a cluster may have, and that run at a time.
CLUSTER, _BLOCKS = 16, 128
# Columns of which a warpgroup adds up its block's rows, and a warp of the
# cluster's.
_COLUMNS, _LANES = 128, 32

# Of (4, 4, columns): a warp's keys, 8 lanes each.
BY_KEY = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, KEYS, 64), (8,))), warp_dims=(-4,),
    lane_dims=(-3, -2), vector_dim=-1)
# Likewise: each lane has 4 columns of all of its warp's keys.
BY_COLUMN = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, 1, 128), (4,))), warp_dims=(-4,), lane_dims=(-2,),
    vector_dim=-1)
# Of (8, 4): a number a lane, the same in each warp.
BY_LANE = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 4), (1,))), warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-3, -2), vector_dim=-1)
# Of a row: the same in each warp.
_ROW = plgpu.Layout.TILED(
    plgpu.Tiling(((64,), (2,))), warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,), vector_dim=-1)


def unsupported(arrays, group: int) -> str | None:
  """Why no kernel can serve, None where one can.

  Args:
    arrays: queries (B, ...), and the cache's, each (B, K, S, width).
    group: query heads per key/value head.
  """
  for array in arrays:
    if array.dtype != jnp.bfloat16:
      return f"needs bfloat16, not {array.dtype}"
  slots, rows = arrays[1].shape[2], arrays[0].shape[0]
  if slots % OWN:
    return f"{slots} slots are not a multiple of {OWN}"
  if group > 8 or rows > 64:
    return f"serves 8 queries a group and 64 rows, not {group} and {rows}"
  return None


def span() -> int:
  """Keys that a block takes in a round."""
  return PARTS * OWN


def cluster_size(heads: int, slots: int) -> int:
  """How many blocks share a head: a power of two.

  Args:
    heads: of all rows.
    slots: of each.
  """
  there = max(_BLOCKS // heads, 1)
  needed = pl.cdiv(slots, span())
  return min(CLUSTER, 1 << (there.bit_length() - 1),
             1 << (needed - 1).bit_length())


class Place:
  """Where a warpgroup is, and which keys are its own.

  Attributes:
    row: of the batch.
    head: of all rows' key/value heads.
    of_row: of its row's.
    heads: how many a row has.
    cluster: how many blocks share the head.
    block: of these.
    part: of the block's warpgroups.
  """

  def __init__(self, heads: int, cluster: int):
    self.head, self.heads, self.cluster = lax.axis_index("head"), heads, cluster
    self.row, self.of_row = self.head // heads, self.head % heads
    self.block, self.part = lax.axis_index("block"), lax.axis_index("part")

  def sixteen(self, i) -> jax.Array:
    """Which 16 slots are its own in round `i`.

    A cluster's blocks come in turn, so that the last round is spread over them.
    """
    return (i * PARTS + self.part) * self.cluster + self.block

  def rounds(self, start, end, part=None):
    """The first round that has such a slot, and the one after the last.

    Args:
      start: the first slot.
      end: the one after the last.
      part: of a warpgroup; None: of this one.
    """
    mine = (self.part if part is None else part) * self.cluster + self.block
    everyone = PARTS * self.cluster

    def before(sixteens):
      return jnp.maximum(sixteens - mine + everyone - 1, 0) // everyone

    return before(start // OWN), before((end + OWN - 1) // OWN)

  def rounds_of_block(self, start, end):
    """Likewise, of any of the block's warpgroups."""
    return (self.rounds(start, end, PARTS - 1)[0],
            self.rounds(start, end, 0)[1])

  def seen(self, i, start, end) -> jax.Array:
    """Which of its keys in round `i` are visible, (4, 4)."""
    warp, key = (
        plgpu.broadcasted_iota(jnp.int32, (WARPS, KEYS), axis,
                               layout=BY_KEY.reduce(2)) for axis in (0, 1))
    slot = self.sixteen(i) * OWN + warp * KEYS + key
    return (slot >= start) & (slot < end)


def all_fit(at: Place, slots: int, stages: int) -> bool:
  """Whether so many rounds are all of a cache."""
  return stages * at.cluster * span() >= slots


def start_copies(at: Place, slots: int, stages: int, start, end,
                 copy: Callable) -> tuple:
  """Starts a warpgroup's first copies.

  Where all rounds have a place, the first one's do not wait for what is
  visible: that takes longer to come than they to be asked for.

  Args:
    at: the warpgroup's place.
    slots: of the cache.
    stages: how many rounds' copies have a place.
    start: the first visible slot, loaded a moment ago.
    end: the one after the last, likewise.
    copy: starts the copies of a round.

  Returns:
    The first round that is to be waited for, and the one after the last.
  """
  early = int(all_fit(at, slots, stages))
  _, there = at.rounds(0, slots)
  if early:
    pl.when(there > 0)(lambda: copy(0))
  first, last = at.rounds(start, end)
  if early:
    first, last = 0, jnp.maximum(last, jnp.minimum(there, 1))
  for i in range(early, stages):
    pl.when(first + i < last)(lambda i=i: copy(first + i))
  return first, last


def fetch_rows(at: Place, group: int, widths, rows_gmem, rotary_gmem
               ) -> Callable:
  """Asks for the head's queries and its newest key and value, a row each.

  They take long to come: what is called meanwhile should not need them.

  Args:
    at: the warpgroup's place.
    group: queries of each key/value head.
    widths: of the parts of a key, turned by themselves.
    rows_gmem: (B, rows, E): queries, and then, where there is `rotary_gmem`,
      keys and values.
    rotary_gmem: (B, 2, E / 2), cosine and sine of each pair's angle, first
      part's and second's; None: the queries have been turned.

  Returns:
    What turns queries and key, and puts all in shared memory, as `rows_memory`
    makes it.
  """
  count = group if rotary_gmem is None else group + 2
  halves = [(sum(widths[:n]) + half * (width // 2), width // 2)
            for n, width in enumerate(widths) for half in (0, 1)]

  def get(ref, first, width):
    return mosaic_gpu.load(ref.at[pl.ds(first, width)], _ROW, optimized=False)

  def fetch(i):
    # The last one's more than once.
    i = jnp.minimum(i, count - 1)
    row = jnp.where(i < group, at.of_row * group + i, at.heads * i + at.of_row)
    return [get(rows_gmem.at[at.row, row], *half) for half in halves]

  mine = [first + at.part for first in range(0, count, PARTS)]
  rows, rotary = [fetch(i) for i in mine], []
  if rotary_gmem is not None:
    rotary = [[get(rotary_gmem.at[at.row, i], first // 2, width)
               for i in (0, 1)] for first, width in halves[::2]]

  def turned(i, row):
    row = [x.astype(jnp.float32) for x in row]
    for n, (cos, sin) in enumerate(rotary):
      a, b = row[2 * n:2 * n + 2]
      for half, x in (0, a * cos - b * sin), (1, b * cos + a * sin):
        row[2 * n + half] = jnp.where(i > group, row[2 * n + half], x)
    return [x.astype(jnp.bfloat16) for x in row]

  def put(ref, row):
    for (first, width), x in zip(halves, row):
      mosaic_gpu.store(ref.at[pl.ds(first, width)], x.astype(ref.dtype))

  def put_all(query_smem, newest_smem):
    for i, row in zip(mine, rows):
      row = turned(i, row)
      pl.when(i < group)(lambda i=i, row=row: put(query_smem.at[i], row))
      if rotary:
        pl.when((i >= group) & (i < count))(
            lambda i=i, row=row: put(newest_smem.at[i - group], row))

  return put_all


def rows_memory(group: int, width: int) -> dict:
  """Shared memory of queries, and of the newest key and value.

  Queries are in float32: each warp multiplies by them, each round.
  """
  return dict(query_smem=plgpu.SMEM((group, width), jnp.float32),
              newest_smem=plgpu.SMEM((2, width), jnp.bfloat16))


def store_row(row_smem, *refs) -> None:
  """Writes a row in shared memory to other places."""
  row = mosaic_gpu.load(row_smem, _ROW, optimized=False)
  for ref in refs:
    mosaic_gpu.store(ref, row)


def spread(x: jax.Array, shape, axes, layout) -> jax.Array:
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)


def read_queries(query_smem) -> list[list[jax.Array]]:
  """Of (G, columns), each query's pieces of 64."""
  queries, width = query_smem.shape
  return [[mosaic_gpu.load(query_smem.at[g, pl.ds(first, 64)],
                           BY_KEY.reduce((0, 1)), optimized=False)
           for first in range(0, width, 64)] for g in range(queries)]


def products(key_smem, queries) -> list[jax.Array]:
  """Scaled products of (4, 4, columns) with each query, (4, 4) in float32.

  Args:
    key_smem: (4, 4, columns).
    queries: as `read_queries` reads them.
  """
  totals = [None] * len(queries)
  for i, pieces in enumerate(zip(*queries)):
    key = mosaic_gpu.load(key_smem.at[:, :, pl.ds(i * 64, 64)], BY_KEY
                          ).astype(jnp.float32)
    for g, (piece, total) in enumerate(zip(pieces, totals)):
      product = key * spread(piece, key.shape, (2,), BY_KEY)
      totals[g] = product if total is None else total + product
  return [total.sum(2) * key_smem.shape[2] ** -0.5 for total in totals]


def capped(x, cap: float):
  """cap tanh(x / cap): of exponentials, as approximate tanh is too coarse."""
  return cap - 2.0 * cap / (jnp.exp(x * (2.0 / cap)) + 1.0) if cap else x


def add_values(totals, weight_smem, value_smem) -> list[jax.Array]:
  """Adds each warp's values, times their weights, to each query's total.

  Args:
    totals: (4, E) of each.
    weight_smem: (G, 4, 4); below 0: that key does not count. What stands in a
      slot that no query counts does not matter.
    value_smem: (4, 4, E).
  """
  value = mosaic_gpu.load(value_smem, BY_COLUMN, optimized=False
                          ).astype(jnp.float32)
  weights = [mosaic_gpu.load(weight_smem.at[g], BY_COLUMN.reduce(2),
                             optimized=False) for g in range(len(totals))]
  greatest = functools.reduce(jnp.maximum, weights)
  value = jnp.where(spread(greatest < 0.0, value.shape, (0, 1), BY_COLUMN),
                    0.0, value)
  return [total + (value * spread(jnp.where(weight < 0.0, 0.0, weight),
                                  value.shape, (0, 1), BY_COLUMN)).sum(1)
          for total, weight in zip(totals, weights)]


def no_values(group: int, width: int) -> list[jax.Array]:
  """Totals to begin with."""
  return [plgpu.layout_cast(jnp.zeros((WARPS, width), jnp.float32),
                            BY_COLUMN.reduce(1))] * group


def block_sync(barrier) -> None:
  """Waits for the block's warpgroups."""
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def threads() -> list[jax.Array]:
  """The warp of each of a warpgroup's threads, and its lane."""
  thread = plgpu.broadcasted_iota(jnp.int32, (WARPS * _LANES,), 0,
                                  layout=mosaic_gpu.BY_THREAD)
  return [thread // _LANES, thread % _LANES]


def _add_up(part_ref, sum_refs, layout, rescale: bool):
  """Adds rows up, and the numbers that belong to them.

  Args:
    part_ref: the rows, (n, columns).
    sum_refs: divisors (n,), and either counts or, to `rescale`, what has been
      subtracted from each row's exponents.
    layout: of the rows.
    rescale: whether exponents differ so.
  """
  part = mosaic_gpu.load(part_ref, layout, optimized=False)
  divisor, other = (mosaic_gpu.load(ref, layout.reduce(1), optimized=False)
                    for ref in sum_refs)
  if not rescale:
    return part.sum(0), divisor.sum(), other.sum()
  greatest = jnp.max(other)
  factor = jnp.exp(other - greatest)
  part = part * spread(factor, part.shape, (0,), layout)
  return part.sum(0), (divisor * factor).sum(), greatest


def _share(me, workers: int, jobs: int, do: Callable) -> None:
  """Calls `do` with each of the worker's jobs."""
  for first in range(0, jobs, workers):
    pl.when(first + me < jobs)(functools.partial(do, first + me))


def join(at: Place, m, totals, sums, finish: Callable, rescale: bool = False
         ) -> None:
  """Adds up what all warps of the cluster have, in a fixed order.

  Args:
    at: the warpgroup's place.
    m: has what `join_memory` makes as attributes.
    totals: of each query, (4, E).
    sums: of each query two of (4,), as `_add_up` has them.
    finish: called with a query, its first column, the total of 32, and the
      two sums; by one warpgroup for each.
    rescale: as `_add_up` has it.
  """
  width, own = totals[0].shape[1], pl.ds(at.part * WARPS, WARPS)
  for g, pair in enumerate(sums):
    for i, x in enumerate(pair):
      mosaic_gpu.store(m.sum_smem.at[i, g, own], x)

  def block_part(of, job):
    """Sends each block the columns that it finishes: others each warp's."""
    blocks = width // _COLUMNS
    g = job // blocks
    total, *both = _add_up(
        m.part_smem.at[:, g, pl.ds(job % blocks * _COLUMNS, _COLUMNS)],
        [m.sum_smem.at[i, of + g] for i in (0, 1)],
        mosaic_gpu.COLUMN_A_THREAD, rescale)
    warp, lane = threads()
    job = (of * blocks + job) * WARPS + warp
    block, place = job % at.cluster, job // at.cluster
    mosaic_gpu.send(total, block, (place * at.cluster + at.block) * _LANES
                    + lane, m.all_part_smem)
    mosaic_gpu.send(jnp.where(lane == 0, *both),
                    jnp.where(lane < 2, block, at.cluster),
                    (place * 2 + lane) * at.cluster + at.block, m.all_sum_smem)

  together = m.part_smem.shape[1]
  for of in range(0, len(totals), together):
    if of:
      block_sync(m.block_barrier)
    some = totals[of:of + together]
    for i, total in enumerate(some):
      mosaic_gpu.store(m.part_smem.at[own, i], total)
    block_sync(m.block_barrier)
    _share(at.part, PARTS, len(some) * width // _COLUMNS,
           functools.partial(block_part, of))
  mosaic_gpu.cluster_sync()

  def result(job):
    place, first = job // at.cluster, job * _LANES
    total, *both = _add_up(
        m.all_part_smem.at[place],
        [m.all_sum_smem.at[place, i] for i in (0, 1)],
        mosaic_gpu.COLUMN_A_LANE, rescale)
    finish(first // width, first % width, total, *both)

  _share(at.part * at.cluster + at.block, PARTS * at.cluster,
         len(totals) * width // _LANES, result)


def join_memory(group: int, width: int, cluster: int) -> dict:
  """What `join` uses: for what the block's warps have, and what blocks send."""
  # Queries that a block does together: of more of them one, or it does not fit.
  together = group if group <= 2 else 1
  rows, places = PARTS * WARPS, pl.cdiv(group * width // _LANES, cluster)
  return dict(
      part_smem=plgpu.SMEM((rows, together, width), jnp.float32),
      sum_smem=plgpu.SMEM((2, group, rows), jnp.float32),
      all_part_smem=plgpu.SMEM((places, cluster, _LANES), jnp.float32),
      all_sum_smem=plgpu.SMEM((places, 2, cluster), jnp.float32),
      block_barrier=plgpu.Barrier(num_arrivals=PARTS))


def kernel(body: Callable, out_type, heads: int, cluster: int, **scratch):
  """A kernel on a cluster for each head.

  Not `plgpu.kernel`, which takes no array to write in place.
  """
  def scoped(*refs):
    pl.run_scoped(functools.partial(body, *refs), collective_axes="part",
                  **scratch)

  scoped.__name__ = getattr(body, "func", body).__name__
  return pl.kernel(
      scoped, out_type=out_type,
      mesh=plgpu.Mesh(grid=(heads,), grid_names=("head",), cluster=(cluster,),
                      cluster_names=("block",), num_threads=PARTS,
                      thread_name="part"),
      # Warps are kept busy by instructions: one for an exponential, not eight.
      compiler_params=dataclasses.replace(mosaic_gpu.PARAMS, approx_math=True))


def own_keys(x_BxKxSxE: jax.Array) -> jax.Array:
  """(heads, S / 16, 4, 4, E)."""
  b, k, s, e = x_BxKxSxE.shape
  return x_BxKxSxE.reshape(b * k, s // OWN, WARPS, KEYS, e)


def make_bounds(lengths_B: jax.Array, window: jax.Array | int, slots: int
                ) -> jax.Array:
  """Of each row the first visible slot, the one after the last, the newest."""
  ends = [jnp.maximum(lengths_B - window, 0), jnp.minimum(lengths_B, slots),
          lengths_B - 1]
  return jnp.stack(ends, -1).astype(jnp.int32)
