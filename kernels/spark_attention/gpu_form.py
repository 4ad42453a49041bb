"""The form that Spark attention's GPU kernels have.

A thread block has two warpgroups that compute, each with 64 rows of its own
whose sums stay in registers, and a third that copies tiles of 64 other rows
through a ring in shared memory, which both read. The rows are queries, and
keys pass by; or the other way about.

A group's heads and positions are one list of rows: tile t of 64 is of head
t % G. Blocks of keys that no query of a tile sees, whether they come later, lie
before the window or are of other documents, are not read; and where a whole
block is seen, no mask is needed.
"""

import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from sparse_lm.kernels import mosaic_gpu

# Rows of a warpgroup, and of what passes by: those of a tensor core product.
TILE = 64
# Warpgroups that compute.
COMPUTE = 2
# 240 and 24 of each thread are all that a multiprocessor has.
_REGISTERS, _COPY_REGISTERS = 240, 24
# Shared memory for tiles.
_TILES_BYTES = 224 * 1024
MAX_SLOTS = 8
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Columns whose elements are computed one after the other. A warpgroup's sums
# fill half of its registers, scores the rest: little is left between.
PART = 8 if mosaic_gpu.CONCATENATES else TILE
# A number for each row of a product, and for each column.
ROW, COLUMN = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
# exp2 and log2 to float32's 22 bits. No sum here crosses warps.
_PARAMS = dataclasses.replace(mosaic_gpu.PARAMS, approx_math=True,
                              reduction_scratch_bytes=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
  """Where tokens are, which says who sees whom.

  Attributes:
    token: positions and segments (2, B, L).
    window: how far a query sees (1,).
    keys: of a thread block's queries, the first block of keys that some see,
      the first that all see whole, the end of those, the end: (4, B, blocks).
    queries: the same of a thread block's keys.
  """

  token: jax.Array
  window: jax.Array
  keys: jax.Array
  queries: jax.Array


def _ranges(some: jax.Array, whole: jax.Array) -> jax.Array:
  """`Places.keys` of (B, tiles, blocks), a row each two tiles."""
  blocks = some.shape[-1]
  index = jnp.arange(blocks)
  first = jnp.argmax(some, -1)
  end = blocks - jnp.argmax(some[..., ::-1], -1)
  # The last run of blocks that are seen whole.
  whole_end = jnp.where(whole, index + 1, 0).max(-1)
  gap = ~whole & (index < whole_end[..., None])
  whole_first = jnp.where(gap, index + 1, 0).max(-1)
  first, whole_first, whole_end, end = (
      x.reshape(x.shape[0], -1, COMPUTE)
      for x in (first, whole_first, whole_end, end))
  return jnp.stack([first.min(-1), whole_first.max(-1), whole_end.min(-1),
                    end.max(-1)]).astype(jnp.int32)


def locate(positions_BxL, segments_BxL, window, heads: int) -> Places:
  """For `heads` query heads to each of the keys'."""
  if segments_BxL is None:
    segments_BxL = jnp.zeros_like(positions_BxL)
  window = jnp.asarray(window, jnp.int32)
  token = jnp.stack([positions_BxL, segments_BxL]).astype(jnp.int32)
  blocks = token.reshape(*token.shape[:2], -1, TILE)
  (low, low_segment), (high, high_segment) = blocks.min(-1), blocks.max(-1)

  def query(x):
    return x[:, :, None]

  def key(x):
    return x[:, None, :]

  index = np.arange(low.shape[1])
  nearest, farthest = query(low) - key(high), query(high) - key(low)
  some = ((index[:, None] >= index) & (farthest >= 0) & (nearest < window)
          & (query(low_segment) <= key(high_segment))
          & (query(high_segment) >= key(low_segment)))
  whole = (some & (nearest >= 0) & (farthest < window)
           & (query(low_segment) == key(high_segment))
           & (query(high_segment) == key(low_segment)))
  by_tile = (jnp.repeat(x, heads, 1) for x in (some, whole))
  by_key = (x.swapaxes(1, 2) for x in (some, whole))
  return Places(token, window[None], _ranges(*by_tile), _ranges(*by_key))


class Side:
  """Of a kernel, which rows a warpgroup keeps, and which pass by.

  Attributes:
    over_keys: whether keys pass by queries, or queries by keys.
    b: this block's sequence.
    k: its key/value head.
    warpgroup: this one's number; the last one copies.
    first: the first step; `end`: the last step's successor.
  """

  def __init__(self, over_keys: bool, heads: int, pairs: int,
               places: Places):
    self.over_keys, self._heads, self._places = over_keys, heads, places
    self.b, self.k = lax.axis_index("sequence"), lax.axis_index("head")
    self.warpgroup = lax.axis_index("warpgroup")
    # The longest first: the last queries, the first keys.
    pair = lax.axis_index("pair")
    pair = pairs - 1 - pair if over_keys else pair
    ranges = places.keys if over_keys else places.queries
    first, self._whole_first, self._whole_end, end = (
        ranges[i, self.b, pair] for i in range(4))
    self._each = 1 if over_keys else heads
    self.first, self.end = first * self._each, end * self._each
    tile = pair * COMPUTE + self.warpgroup
    self._tile = tile

  def rows(self) -> tuple:
    """Where this warpgroup's rows are, of an array with heads."""
    if self.over_keys:
      return self._query(self._tile)
    return self.b, self.k, pl.ds(self._tile * TILE, TILE)

  def columns(self, step) -> tuple:
    """Where those rows are that pass by at a step."""
    if self.over_keys:
      return self.b, self.k, pl.ds(step * TILE, TILE)
    return self._query(step)

  def _query(self, tile):
    head = lax.rem(tile, jnp.int32(self._heads))
    first = lax.div(tile, jnp.int32(self._heads)) * TILE
    return self.b, self.k, head, pl.ds(first, TILE)

  def is_whole(self, step):
    """Whether all rows see all of a step's columns, or are seen by them."""
    block = lax.div(step, jnp.int32(self._each))
    return (block >= self._whole_first) & (block < self._whole_end)

  def seen(self, step, first: int = 0, count: int = TILE):
    """The mask (rows, columns) of a step, or of some of its columns."""
    at_row, at_column = self.rows()[-1], self.columns(step)[-1]
    at_column = pl.ds(at_column.start + first, count)
    (row, row_segment), (column, column_segment) = (
        [spread(mosaic_gpu.load(self._places.token.at[i, self.b, at], layout,
                                 optimized=False), axis, count)
         for i in range(2)]
        for axis, (at, layout) in enumerate(
            ((at_row, ROW), (at_column, COLUMN))))
    distance = row - column if self.over_keys else column - row
    return ((distance >= 0) & (distance < self._places.window[0])
            & (row_segment == column_segment))


def spread(x, axis: int, columns: int | None = None):
  """Of rows (axis 0) or columns (axis 1) over both; None: `PART` columns."""
  return lax.broadcast_in_dim(x, (TILE, columns or PART), (axis,))


class Ring:
  """Tiles in shared memory, of a few arrays in turn, and their numbers.

  Tile n is of array n % arrays. It is there from `wait` to `release`. The
  numbers of a step are there until the next step's first release.
  """

  def __init__(self, slots, full, free, numbers=None, numbers_full=None):
    self._slots, self._full, self._free = slots, full, free
    self._numbers, self._numbers_full = numbers, numbers_full
    self._count = slots.shape[0]

  def fill(self, gmems, numbers_gmem, side: Side) -> None:
    """Copies every step's tiles as slots become free."""
    width = pl.ds(0, self._slots.shape[-1])

    @pl.loop(side.first, side.end)
    def _(step):
      at = side.columns(step)
      for i, gmem in enumerate(gmems):
        n = (step - side.first) * len(gmems) + i
        slot = lax.rem(n, jnp.int32(self._count))

        @pl.when(n >= self._count)
        def _():
          plgpu.barrier_wait(self._free.at[slot])

        if self._numbers is not None and i == len(gmems) - 1:
          turn = self._turn(step - side.first)
          plgpu.copy_gmem_to_smem(
              numbers_gmem.at[(*at[:-1], slice(None), at[-1])],
              self._numbers.at[turn], self._numbers_full.at[turn])
        plgpu.copy_gmem_to_smem(gmem.at[(*at, width)], self._slots.at[slot],
                                self._full.at[slot])

  def _turn(self, i):
    return lax.rem(i, jnp.int32(self._numbers.shape[0]))

  def wait(self, n):
    slot = lax.rem(n, jnp.int32(self._count))
    plgpu.barrier_wait(self._full.at[slot])
    return self._slots.at[slot]

  def release(self, n) -> None:
    plgpu.barrier_arrive(self._free.at[lax.rem(n, jnp.int32(self._count))])

  def numbers(self, i):
    """Those of the i-th step: calling it reads the j-th of a few columns."""
    turn = self._turn(i)
    plgpu.barrier_wait(self._numbers_full.at[turn])
    return lambda j, first: spread(mosaic_gpu.load(
        self._numbers.at[turn, j, pl.ds(first, PART)], COLUMN), 1)


class Work:
  """What a warpgroup that computes has.

  Attributes:
    side: `Side`.
    results: the outputs' references.
    row_numbers: the queries', where its rows are queries.
  """

  def __init__(self, side: Side, ring: Ring, tiles, numbers_gmem, count: int,
               results):
    self.side, self._ring, self._tiles = side, ring, tiles
    self.results, self.shape = results, tiles[0].shape[1:]
    if side.over_keys:
      *at, rows = side.rows()
      self.row_numbers = [
          mosaic_gpu.load(numbers_gmem.at[(*at, i, rows)], ROW,
                          optimized=False) for i in range(count)]

  def tiles(self, step) -> list:
    """Those that it keeps.

    They look as if they were others at each step. Or else the compiler finds
    every product's addresses before the loop, and no registers for them.
    """
    number = lax.min(self.side.warpgroup, step + 1)
    return [x.at[number] for x in self._tiles]

  def loop(self, arrays: int, body, start):
    """body(step, wait, release, carry), with `arrays` tiles at each step."""
    def step(i, carry):
      n = arrays * (i - self.side.first)
      return body(i, lambda j: self._ring.wait(n + j),
                  lambda j: self._ring.release(n + j), carry)

    return lax.fori_loop(self.side.first, self.side.end, step, start)

  def numbers(self, step):
    """The queries': calling it gives the j-th, over columns from `first`."""
    if self.side.over_keys:
      return lambda j, first: spread(self.row_numbers[j], 0)
    return self._ring.numbers(step - self.side.first)

  def write(self, columns, values) -> None:
    """Replaces columns of the first tile."""
    tile = self._tiles[0].at[self.side.warpgroup]
    tile[:, columns] = values.astype(jnp.bfloat16)

  def send(self) -> None:
    """Copies the first tile to the first output."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(self._tiles[0].at[self.side.warpgroup],
                            self.results[0].at[self.side.rows()])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def by_parts(f, *arrays, carry=()):
  """Calls f(first column, carry, *parts): for a carry and parts of results."""
  results = []
  for first in range(0, TILE, PART):
    parts = (lax.slice(x, (0, first), (TILE, first + PART)) for x in arrays)
    carry, *part = f(first, carry, *parts)
    results.append(part)
  return carry, *(lax.concatenate(parts, 1) for parts in zip(*results))


def run(compute, over_keys: bool, places: Places, rows, passing, numbers,
            out_type, width: int):
  """Runs a kernel.

  Args:
    compute: called with a warpgroup's `Work`.
    over_keys: as `Side` has it.
    places: of the tokens.
    rows: arrays of which a warpgroup keeps a tile.
    passing: arrays whose tiles pass by.
    numbers: of each query, in float32.
    out_type: the outputs' types.
    width: columns of the arrays that are read, from the first.
  """
  b, k, heads, length, _ = (rows if over_keys else passing)[0].shape
  pairs = length // TILE * (heads if over_keys else 1) // COMPUTE
  numbers = jnp.stack(numbers, -2)
  count = numbers.shape[-2]
  slots = min(_TILES_BYTES // (2 * TILE * width) - COMPUTE * len(rows),
              MAX_SLOTS)
  turns = slots // len(passing) + 1
  tile = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16,
                           transforms=_SWIZZLED)
  scratch = dict(
      tiles=[tile((COMPUTE, TILE, width)) for _ in rows],
      here=plgpu.Barrier(num_arrivals=len(rows), num_barriers=COMPUTE),
      ring=dict(slots=tile((slots, TILE, width)),
                full=plgpu.Barrier(num_barriers=slots),
                free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots)))
  if not over_keys:
    scratch["ring"] |= dict(
        numbers=plgpu.SMEM((turns, count, TILE), jnp.float32),
        numbers_full=plgpu.Barrier(num_barriers=turns))
  sizes = [len(rows), len(passing), 1, 4]

  def body(*refs, tiles, here, ring):
    refs = iter(refs)
    row_gmems, passing_gmems, (numbers_gmem,), place_gmems = (
        [next(refs) for _ in range(size)] for size in sizes)
    side = Side(over_keys, heads, pairs, Places(*place_gmems))
    ring = Ring(**ring)

    @pl.when(side.warpgroup < COMPUTE)
    def _():
      plgpu.set_max_registers(_REGISTERS, action="increase")
      barrier = here.at[side.warpgroup]
      for gmem, smem in zip(row_gmems, tiles):
        plgpu.copy_gmem_to_smem(gmem.at[(*side.rows(), pl.ds(0, width))],
                                smem.at[side.warpgroup], barrier)
      plgpu.barrier_wait(barrier)
      compute(Work(side, ring, tiles, numbers_gmem, count, list(refs)))

    @pl.when(side.warpgroup == COMPUTE)
    def _():
      plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
      ring.fill(passing_gmems, numbers_gmem, side)

  grid = dict(pair=pairs, sequence=b, head=k)
  return plgpu.kernel(
      body, out_type=out_type, grid=tuple(grid.values()),
      grid_names=tuple(grid), num_threads=COMPUTE + 1,
      thread_name="warpgroup", scratch_types=scratch,
      compiler_params=_PARAMS)(
          *rows, *passing, numbers, places.token, places.window, places.keys,
          places.queries)
