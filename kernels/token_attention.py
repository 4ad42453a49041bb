"""What Hopper kernels of attention from one token to its cache share.

A thread block has a chunk of one key/value head's keys, four warps' keys, and
the queries of that head's group. It turns queries to their position where it
reads them, and the block that has the newest slot writes the newest key and
value there, in place. XLA needs three kernels for that, and each takes as long
as one of these.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu

# Keys of a chunk, of a warp. With half as many a Spark model's tokens took 1.5%
# less on an H200, a dense one's 7% more.
CHUNK, OWN = 64, 16
WARPS = CHUNK // OWN
# A copy's longest dimension.
COLUMNS = 256
# Partial sums that are added up at a time, four by four.
_FOURS = 8

# Of (4, 16, columns): 4 keys a warp at a time, 8 lanes a key.
KEYS = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, 4, 64), (8,))), warp_dims=(-4,),
    lane_dims=(-3, -2), vector_dim=-1)
# Of (4, rows, columns): a row a warp, 4 columns a thread.
ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, 1, 128), (4,))), warp_dims=(-4,), lane_dims=(-2,),
    vector_dim=-1)
# Of (parts, 4, columns): likewise.
PARTIAL = plgpu.Layout.TILED(
    plgpu.Tiling(((1, WARPS, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,),
    vector_dim=-1)
# Of a number for each warp's keys in the cache: each warp has all.
STATE = plgpu.Layout.TILED(
    plgpu.Tiling(((32,), (1,))), warp_dims=(plgpu.Replicated(4),),
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
  if slots % CHUNK:
    return f"{slots} slots are not a multiple of {CHUNK}"
  if group > 8 or rows > 64:
    return f"serves 8 queries a group and 64 rows, not {group} and {rows}"
  return None


class Queries:
  """Where the group's queries and the newest key and value are.

  Attributes:
    row: of the batch.
    head: of its key/value heads.
    group: query heads per key/value head.
  """

  def __init__(self, rows_gmem, rotary_gmem, heads: int, group: int):
    """Takes where they are.

    Args:
      rows_gmem: (B, rows, E): queries, and then, where there is
        `rotary_gmem`, keys and values.
      rotary_gmem: (B, 2, E / 2), cosine and sine of each pair's angle, first
        part's and second's; None: what is there has been turned.
      heads: key/value heads.
      group: queries of each.
    """
    self.row = lax.axis_index("head") // heads
    self.head = lax.axis_index("head") % heads
    self.group = group
    self._rows, self._rotary, self._heads = rows_gmem, rotary_gmem, heads

  def _turned(self, row, first: int, width: int) -> list[jax.Array]:
    """Both halves of a part of a row, in float32."""
    half, layout = width // 2, KEYS.reduce((0, 1))

    def get(ref, start):
      return mosaic_gpu.load(ref.at[pl.ds(start, half)], layout,
                             optimized=False).astype(jnp.float32)

    row = self._rows.at[self.row, row]
    a, b = get(row, first), get(row, first + half)
    if self._rotary is None:
      return [a, b]
    cos, sin = (get(self._rotary.at[self.row, i], first // 2) for i in (0, 1))
    # Rounded, as what the cache holds is.
    return [x.astype(jnp.bfloat16).astype(jnp.float32)
            for x in (a * cos - b * sin, b * cos + a * sin)]

  def query(self, i: int, first: int, width: int) -> list[jax.Array]:
    return self._turned(self.head * self.group + i, first, width)

  def newest(self, widths) -> list[list[jax.Array]]:
    """The newest key's parts and its value, as `store_halves` takes them.

    Args:
      widths: of the key's parts.
    """
    key, first, parts = self._heads * self.group + self.head, 0, []
    for width in widths:
      parts.append(self._turned(key, first, width))
      first += width
    value = self._rows.at[self.row, key + self._heads]
    half = value.shape[-1] // 2
    return [*parts, [mosaic_gpu.load(value.at[pl.ds(i * half, half)],
                                     KEYS.reduce((0, 1)), optimized=False)
                     for i in (0, 1)]]


def store_halves(ref, halves) -> None:
  """Writes a row."""
  half = halves[0].shape[0]
  for i, x in enumerate(halves):
    mosaic_gpu.store(ref.at[pl.ds(i * half, half)], x.astype(jnp.bfloat16))


def spread(x: jax.Array, shape, axes, layout) -> jax.Array:
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)


def products(key_smem, halves) -> jax.Array:
  """Scaled products of a chunk's keys with a query, (4, 16) in float32."""
  half, total = halves[0].shape[0], None
  for i, x in enumerate(halves):
    key = mosaic_gpu.load(key_smem.at[:, :, pl.ds(i * half, half)], KEYS)
    product = key.astype(jnp.float32) * spread(x, key.shape, (2,), KEYS)
    total = product if total is None else total + product
  return total.sum(2) * (2 * half) ** -0.5


def seen_keys(start, end) -> jax.Array:
  """Which of the chunk's keys are visible, (4, 16)."""
  layout = KEYS.reduce(2)
  warp, own = (plgpu.broadcasted_iota(jnp.int32, (WARPS, OWN), i,
                                      layout=layout) for i in (0, 1))
  key = warp * OWN + own + lax.axis_index("chunk") * CHUNK
  return (key >= start) & (key < end)


def overlap(start, end, parts: jax.Array) -> jax.Array:
  """How many of each warp's keys are visible, by the warps' numbers."""
  below = jnp.minimum(parts * OWN + OWN, end)
  count = below - jnp.maximum(parts * OWN, start)
  return jnp.maximum(count, 0).astype(jnp.float32)


def in_sight(bounds_gmem, row, chunk):
  """The row's first visible slot, the one after the last, is one here?"""
  start, end = bounds_gmem[row, 0], bounds_gmem[row, 1]
  return start, end, (chunk * CHUNK < end) & ((chunk + 1) * CHUNK > start)


def wait_unseen(visible, barriers) -> None:
  """Waits for copies that nothing needs: a block must not end before them."""
  @pl.when(jnp.logical_not(visible))
  def _():
    for barrier in barriers:
      plgpu.barrier_wait(barrier)


def capped(x, cap: float):
  return cap * jnp.tanh(x / cap) if cap else x


def add_values(weight_smem, value_smem, part_gmem) -> None:
  """Adds up a chunk's values, each times its weight.

  Args:
    weight_smem: (G, 4, 16); below 0: what stands in that slot must not matter.
    value_smem: (4, 16, E).
    part_gmem: written, (chunks / 4, 4, E) of each query, a function of it.
  """
  group, chunk = weight_smem.shape[0], lax.axis_index("chunk")
  totals = [None] * group
  for i in range(0, OWN, 4):
    four = pl.ds(i, 4)
    value = mosaic_gpu.load(value_smem.at[:, four], ROWS).astype(jnp.float32)
    for g in range(group):
      weight = mosaic_gpu.load(weight_smem.at[g, :, four], ROWS.reduce(2),
                               optimized=False)
      weight = spread(weight, value.shape, (0, 1), ROWS)
      part = jnp.where(weight < 0.0, 0.0, weight * value).sum(1)
      totals[g] = part if totals[g] is None else totals[g] + part
  for g, total in enumerate(totals):
    mosaic_gpu.store(part_gmem(g).at[chunk // 4, chunk % 4], total.sum(0))


def fours(chunks: int) -> int:
  """How many fours of chunks `add_parts` wants there to be."""
  step = min(pl.cdiv(chunks, 4), _FOURS)
  return step * pl.cdiv(chunks, 4 * step)


def chunks_there(first, count: int, start, end) -> jax.Array:
  """Which of `count` fours of chunks from `first` on are in sight: (count, 4).
  """
  four, one = (plgpu.broadcasted_iota(jnp.int32, (count, 4), axis,
                                      layout=PARTIAL.reduce(2))
               for axis in (0, 1))
  chunk = (four + first) * 4 + one
  return (chunk * CHUNK < end) & ((chunk + 1) * CHUNK > start)


def add_parts(part_gmem, start, end, factor=None) -> jax.Array:
  """Adds up what `add_values` has left of the chunks in sight, (4, E).

  Args:
    part_gmem: a query's.
    start: the first visible slot.
    end: the one after the last.
    factor: what to multiply each chunk's part with, (step, 4), a function of
      which fours; None: nothing.
  """
  step = min(part_gmem.shape[0], _FOURS)
  span = step * 4 * CHUNK

  def add(i, total):
    rows = pl.ds(i * step, step)
    parts = mosaic_gpu.load(part_gmem.at[rows], PARTIAL, optimized=False)
    there = chunks_there(i * step, step, start, end)
    # Below 0 where nothing was written.
    wide = jnp.where(there, factor(rows) if factor else 1.0, -1.0)
    wide = spread(wide, parts.shape, (0, 1), PARTIAL)
    return total + jnp.where(wide < 0.0, 0.0, parts * wide).sum(0)

  zero = plgpu.layout_cast(jnp.zeros(part_gmem.shape[1:], jnp.float32),
                           PARTIAL.reduce(0))
  return lax.fori_loop(start // span, pl.cdiv(end, span), add, zero)


def kernel(body: Callable, out_type, grid, **scratch):
  """A kernel of `grid`, by name of its axes.

  Not `plgpu.kernel`, which takes no array to write in place.
  """
  def scoped(*refs):
    pl.run_scoped(functools.partial(body, *refs), **scratch)

  scoped.__name__ = getattr(body, "func", body).__name__
  return pl.kernel(
      scoped, out_type=out_type,
      mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid)),
      compiler_params=mosaic_gpu.PARAMS)


def own_keys(x_BxKxSxE: jax.Array) -> jax.Array:
  """(heads, S / 16, 16, E)."""
  b, k, s, e = x_BxKxSxE.shape
  return x_BxKxSxE.reshape(b * k, s // OWN, OWN, e)


def make_bounds(lengths_B: jax.Array, window: jax.Array | int, slots: int
            ) -> jax.Array:
  """Of each row the first visible slot, the one after the last, the newest."""
  ends = [jnp.maximum(lengths_B - window, 0), jnp.minimum(lengths_B, slots),
          lengths_B - 1]
  return jnp.stack(ends, -1).astype(jnp.int32)
