"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

The formulas are `xla.py`'s, and so is the order: each query's statistics, the
values mixed, and backward the scores once more. Five kernels, all of one form.
A thread block has two warpgroups that compute, each with 64 rows of its own
whose sums stay in registers, and a third that copies tiles of 64 other rows
through a ring in shared memory, which both read. In three kernels the rows are
queries and keys pass by: statistics, mixed values, the queries' gradient. In
two it is the other way about: the values' and the keys' gradients. Of those one
kernel could make both, but 64 rows of 2 x 256 sums do not fit in registers.

Exponentials and logarithms have base 2 here, as the hardware has. With
x the unscaled scores and s = x * width^-0.5 * log2(e):

    p = 2^(s1 - shift)    g = softplus / log(2) = log2(1 + 2^s2)

Factors that are the same for a whole sum wait until its end.

A group's heads and positions are one list of rows: tile t of 64 is of head
t % G. Blocks of keys that no query of a tile sees, whether they come later, lie
before the window or are of other documents, are not read; and where a whole
block is seen, no mask is computed.
"""

import dataclasses
import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.gaussian import quantile

# Rows of a warpgroup, and of what passes by: those of a tensor core product.
TILE = 64
# Warpgroups that compute.
_COMPUTE = 2
# 240 and 24 of each thread are all that a multiprocessor has.
_REGISTERS, _COPY_REGISTERS = 240, 24
# Shared memory for tiles.
_TILES_BYTES = 224 * 1024
_MAX_SLOTS = 8
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_LOG2_E = math.log2(math.e)
# Columns whose elements are computed one after the other. A warpgroup's sums
# fill half of its registers, scores the rest: little is left between.
_PART = 8 if mosaic_gpu.CONCATENATES else TILE
# A number for each row of a product, and for each column.
_ROW, _COLUMN = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
# exp2 and log2 to float32's 22 bits. No sum here crosses warps.
_PARAMS = dataclasses.replace(mosaic_gpu.PARAMS, approx_math=True,
                              reduction_scratch_bytes=0)


@dataclasses.dataclass(frozen=True)
class _Spec:
  """What is known when compiling."""

  predictor_dim: int
  top_k: int
  softcap: float


def unsupported(query_BxKxGxLxE: jax.Array, value_BxKxLxE: jax.Array,
                predictor_dim: int) -> str | None:
  """Why these cannot be served, or None if they can."""
  *_, length, width = query_BxKxGxLxE.shape
  if {query_BxKxGxLxE.dtype, value_BxKxLxE.dtype} != {jnp.dtype(jnp.bfloat16)}:
    return (f"needs bfloat16, not {query_BxKxGxLxE.dtype} and "
            f"{value_BxKxLxE.dtype}")
  if length % (_COMPUTE * TILE):
    return f"needs a multiple of {_COMPUTE * TILE} tokens, not {length}"
  if width % 64 or predictor_dim % 64 or width > 256:
    return (f"needs head dims in multiples of 64 up to 256, not "
            f"{predictor_dim} of {width}")
  if value_BxKxLxE.shape[-1] != width:
    return f"needs values of {width} dims, not {value_BxKxLxE.shape[-1]}"
  return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Places:
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
  """`_Places.keys` of (B, tiles, blocks), a row each two tiles."""
  blocks = some.shape[-1]
  index = jnp.arange(blocks)
  first = jnp.argmax(some, -1)
  end = blocks - jnp.argmax(some[..., ::-1], -1)
  # The last run of blocks that are seen whole.
  whole_end = jnp.where(whole, index + 1, 0).max(-1)
  gap = ~whole & (index < whole_end[..., None])
  whole_first = jnp.where(gap, index + 1, 0).max(-1)
  first, whole_first, whole_end, end = (
      x.reshape(x.shape[0], -1, _COMPUTE)
      for x in (first, whole_first, whole_end, end))
  return jnp.stack([first.min(-1), whole_first.max(-1), whole_end.min(-1),
                    end.max(-1)]).astype(jnp.int32)


def _places(positions_BxL, segments_BxL, window, heads: int) -> _Places:
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
  return _Places(token, window[None], _ranges(*by_tile), _ranges(*by_key))


class _Side:
  """Of a kernel, which rows a warpgroup keeps, and which pass by.

  Attributes:
    over_keys: whether keys pass by queries, or queries by keys.
    b: this block's sequence.
    k: its key/value head.
    warpgroup: this one's number; the last one copies.
    first: the first step; `end`: the last step's successor.
  """

  def __init__(self, over_keys: bool, heads: int, pairs: int,
               places: _Places):
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
    tile = pair * _COMPUTE + self.warpgroup
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
        [_spread(mosaic_gpu.load(self._places.token.at[i, self.b, at], layout,
                                 optimized=False), axis, count)
         for i in range(2)]
        for axis, (at, layout) in enumerate(
            ((at_row, _ROW), (at_column, _COLUMN))))
    distance = row - column if self.over_keys else column - row
    return ((distance >= 0) & (distance < self._places.window[0])
            & (row_segment == column_segment))


def _spread(x, axis: int, columns: int | None = None):
  """Of rows (axis 0) or columns (axis 1) over both, `_PART` columns if not said."""
  return lax.broadcast_in_dim(x, (TILE, columns or _PART), (axis,))


class _Ring:
  """Tiles in shared memory, of a few arrays in turn, and their numbers.

  Tile n is of array n % arrays. It is there from `wait` to `release`. The
  numbers of a step are there until the next step's first release.
  """

  def __init__(self, slots, full, free, numbers=None, numbers_full=None):
    self._slots, self._full, self._free = slots, full, free
    self._numbers, self._numbers_full = numbers, numbers_full
    self._count = slots.shape[0]

  def fill(self, gmems, numbers_gmem, side: _Side) -> None:
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
    return lambda j, first: _spread(mosaic_gpu.load(
        self._numbers.at[turn, j, pl.ds(first, _PART)], _COLUMN), 1)


class _Work:
  """What a warpgroup that computes has.

  Attributes:
    side: `_Side`.
    results: the outputs' references.
    row_numbers: the queries', where its rows are queries.
  """

  def __init__(self, side: _Side, ring: _Ring, tiles, numbers_gmem, count: int,
               results):
    self.side, self._ring, self._tiles = side, ring, tiles
    self.results, self.shape = results, tiles[0].shape[1:]
    if side.over_keys:
      *at, rows = side.rows()
      self.row_numbers = [
          mosaic_gpu.load(numbers_gmem.at[(*at, i, rows)], _ROW,
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
      return lambda j, first: _spread(self.row_numbers[j], 0)
    return self._ring.numbers(step - self.side.first)

  def write(self, columns, values) -> None:
    """Replaces columns of the first tile."""
    self._tiles[0].at[self.side.warpgroup][:, columns] = values.astype(jnp.bfloat16)

  def send(self) -> None:
    """Copies the first tile to the first output."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(self._tiles[0].at[self.side.warpgroup],
                            self.results[0].at[self.side.rows()])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _multiply(*products):
  """x y' of each pair, (64, 64) in float32."""
  def multiply(*accumulators):
    for accumulator, (x, y) in zip(accumulators, products):
      plgpu.wgmma(accumulator, x, plgpu.transpose_ref(y, (1, 0)))
    plgpu.wgmma_wait(0)
    return [accumulator[...] for accumulator in accumulators]

  return pl.run_scoped(multiply, *[plgpu.ACC((TILE, TILE), jnp.float32)
                                   for _ in products])


def _zeros():
  """A number for each row."""
  return plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), _ROW)


class _Scores:
  """Of a tile of rows against a tile of columns."""

  def __init__(self, spec: _Spec, width: int):
    self.spec = spec
    self.widths = spec.predictor_dim, width - spec.predictor_dim
    self.predict, self.rest = (pl.ds(first, size) for first, size in zip(
        (0, spec.predictor_dim), self.widths))
    self.scales = [size**-0.5 for size in self.widths]

  def masked(self, x, work: _Work, step):
    """Scores 1, -inf where a key is not seen."""
    def part(first, carry, x):
      seen = work.side.seen(step, first, _PART)
      return carry, jnp.where(seen, x, -jnp.inf)

    def mask(x):
      return _by_parts(part, x)[1]

    return lax.cond(work.side.is_whole(step), lambda x: x, mask, x)

  def softmax(self, x, floor, shift):
    """p of masked scores 1, and 1.0 for keys that are kept."""
    kept = jnp.where(x >= floor, 1.0, 0.0)
    cap, scale = self.spec.softcap, self.scales[0] * _LOG2_E
    if cap:
      # From exponentials: the hardware's tanh has 11 bits.
      x = 1.0 - 2.0 * jnp.exp2(-mosaic_gpu.log2(
          1.0 + jnp.exp2(x * (2 * scale / cap))))
      scale = cap * _LOG2_E
    return kept * jnp.exp2(x * scale - shift), kept

  def slope(self, p, shift):
    """p times the slope of the cap."""
    if not self.spec.softcap:
      return p
    tanh = (mosaic_gpu.log2(p) + shift) * (1 / (self.spec.softcap * _LOG2_E))
    return p * jnp.maximum(1.0 - tanh * tanh, 0.0)

  def gate(self, x):
    """Scores 2 in base 2, and softplus of them."""
    y = x * (self.scales[1] * _LOG2_E)
    soft = mosaic_gpu.log2(1.0 + jnp.exp2(jnp.minimum(y, -y)))
    return y, jnp.maximum(y, 0.0) + soft


def _by_parts(f, *arrays, carry=()):
  """Calls f(first column, carry, *parts): for a carry and parts of results."""
  results = []
  for first in range(0, TILE, _PART):
    carry, *part = f(first, carry, *(lax.slice(x, (0, first), (TILE, first + _PART))
                                     for x in arrays))
    results.append(part)
  return carry, *(lax.concatenate(parts, 1) for parts in zip(*results))


def _accumulate(total, x, y) -> None:
  """Starts total += x y, with x in registers."""
  plgpu.wgmma(total, x, y)


def _measure(work: _Work) -> None:
  """Sums of scores and squares about the center, the best, how many seen."""
  side = work.side
  center = _spread(work.row_numbers[0], 0, TILE)

  def step(i, wait, release, carry):
    rows, = work.tiles(i)
    x, = _multiply((rows, wait(0)))
    release(0)
    off = x - center

    def whole(x, off):
      return (off.sum(1), (off * off).sum(1), x.max(1),
              plgpu.layout_cast(jnp.full((TILE,), float(TILE)), _ROW))

    def part(x, off):
      seen = side.seen(i)
      off = jnp.where(seen, off, 0.0)
      return (off.sum(1), (off * off).sum(1),
              jnp.where(seen, x, -jnp.inf).max(1),
              jnp.where(seen, 1.0, 0.0).sum(1))

    total, squares, best, visible = lax.cond(side.is_whole(i), whole, part, x,
                                             off)
    return (carry[0] + total, carry[1] + squares, jnp.maximum(carry[2], best),
            carry[3] + visible)

  zero = _zeros()
  sums = work.loop(1, step, (zero, zero, zero - jnp.inf, zero))
  for gmem, x in zip(work.results, sums):
    mosaic_gpu.store(gmem.at[side.rows()], x)


def _mix(scores: _Scores, work: _Work) -> None:
  """Weights times what passes by: a query's values, a value's gradient."""
  over_keys = work.side.over_keys

  def run(mixed):
    def step(i, wait, release, sums):
      rows, = work.tiles(i)
      columns = wait(0)
      x_1, x_2 = _multiply(*((rows.at[:, dims], columns.at[:, dims])
                             for dims in (scores.predict, scores.rest)))
      release(0)
      numbers = work.numbers(i)

      def part(first, sums, x_1, x_2):
        p, kept = scores.softmax(x_1, *(numbers(j, first) for j in (0, 1)))
        if over_keys:
          sums = sums[0] + p, sums[1] + kept
        return sums, (p * scores.gate(x_2)[1]).astype(jnp.bfloat16)

      sums, weights = _by_parts(part, scores.masked(x_1, work, i), x_2,
                                carry=sums)
      _accumulate(mixed, weights, wait(1))
      plgpu.wgmma_wait(0)
      release(1)
      return sums

    zero = plgpu.layout_cast(jnp.zeros((TILE, _PART), jnp.float32),
                             plgpu.Layout.WGMMA)
    sums = work.loop(2, step, (zero, zero) if over_keys else ())
    return mixed[...], *(x.sum(1) for x in sums)

  mixed, *sums = pl.run_scoped(run, plgpu.ACC(work.shape, jnp.float32))
  mixed *= 1 / _LOG2_E
  if over_keys:
    mixed /= lax.broadcast_in_dim(sums[0], mixed.shape, (0,))
    for gmem, x in zip(work.results[1:], sums):
      mosaic_gpu.store(gmem.at[work.side.rows()], x)
  work.write(slice(None), mixed)
  work.send()


def _pull(scores: _Scores, work: _Work) -> None:
  """The gradient of queries, or of keys."""
  predict, rest = scores.predict, scores.rest

  def run(d_1, d_2):
    def step(i, wait, release, carry):
      rows, other = work.tiles(i)
      columns = wait(0)
      x_1, x_2 = _multiply(*((rows.at[:, dims], columns.at[:, dims])
                             for dims in (predict, rest)))
      numbers = work.numbers(i)

      def weigh(first, carry, x_1):
        p, _ = scores.softmax(x_1, *(numbers(j, first) for j in (0, 1)))
        return carry, p.astype(jnp.bfloat16)

      # To 8 bits, as what is made of it will be: it waits in registers.
      _, p = _by_parts(weigh, scores.masked(x_1, work, i))
      a, = _multiply((other, wait(1)))
      release(1)

      def part(first, carry, x_2, a, p):
        y, gate = scores.gate(x_2)
        p = p.astype(jnp.float32)
        slope = scores.slope(p, numbers(1, first))
        # 2^(y - gate) is the slope of softplus, a sigmoid.
        parts = (slope * (gate * a - numbers(2, first)),
                 p * a * jnp.exp2(y - gate))
        return carry, *(x.astype(jnp.bfloat16) for x in parts)

      _, to_1, to_2 = _by_parts(part, x_2, a, p)
      _accumulate(d_1, to_1, columns.at[:, predict])
      _accumulate(d_2, to_2, columns.at[:, rest])
      plgpu.wgmma_wait(0)
      release(0)
      return carry

    work.loop(2, step, ())
    return d_1[...], d_2[...]

  d_1, d_2 = pl.run_scoped(run, *[plgpu.ACC((TILE, width), jnp.float32)
                                  for width in scores.widths])
  work.write(predict, d_1 * (scores.scales[0] / _LOG2_E))
  work.write(rest, d_2 * scores.scales[1])
  work.send()


def _kernel(compute, over_keys: bool, places: _Places, rows, passing, numbers,
            out_type, width: int):
  """Runs a kernel of the form that all have.

  Args:
    compute: called with a warpgroup's `_Work`.
    over_keys: as `_Side` has it.
    places: of the tokens.
    rows: arrays of which a warpgroup keeps a tile.
    passing: arrays whose tiles pass by.
    numbers: of each query, in float32.
    out_type: the outputs' types.
    width: columns of the arrays that are read, from the first.
  """
  b, k, heads, length, _ = (rows if over_keys else passing)[0].shape
  pairs = length // TILE * (heads if over_keys else 1) // _COMPUTE
  numbers = jnp.stack(numbers, -2)
  count = numbers.shape[-2]
  slots = min(_TILES_BYTES // (2 * TILE * width) - _COMPUTE * len(rows),
              _MAX_SLOTS)
  turns = slots // len(passing) + 1
  tile = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16,
                           transforms=_SWIZZLED)
  scratch = dict(
      tiles=[tile((_COMPUTE, TILE, width)) for _ in rows],
      here=plgpu.Barrier(num_arrivals=len(rows), num_barriers=_COMPUTE),
      ring=dict(slots=tile((slots, TILE, width)),
                full=plgpu.Barrier(num_barriers=slots),
                free=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=slots)))
  if not over_keys:
    scratch["ring"] |= dict(
        numbers=plgpu.SMEM((turns, count, TILE), jnp.float32),
        numbers_full=plgpu.Barrier(num_barriers=turns))
  sizes = [len(rows), len(passing), 1, 4]

  def body(*refs, tiles, here, ring):
    refs = iter(refs)
    row_gmems, passing_gmems, (numbers_gmem,), place_gmems = (
        [next(refs) for _ in range(size)] for size in sizes)
    side = _Side(over_keys, heads, pairs, _Places(*place_gmems))
    ring = _Ring(**ring)

    @pl.when(side.warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(_REGISTERS, action="increase")
      barrier = here.at[side.warpgroup]
      for gmem, smem in zip(row_gmems, tiles):
        plgpu.copy_gmem_to_smem(gmem.at[(*side.rows(), pl.ds(0, width))],
                                smem.at[side.warpgroup], barrier)
      plgpu.barrier_wait(barrier)
      compute(_Work(side, ring, tiles, numbers_gmem, count, list(refs)))

    @pl.when(side.warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
      ring.fill(passing_gmems, numbers_gmem, side)

  grid = dict(pair=pairs, sequence=b, head=k)
  return plgpu.kernel(
      body, out_type=out_type, grid=tuple(grid.values()),
      grid_names=tuple(grid), num_threads=_COMPUTE + 1,
      thread_name="warpgroup", scratch_types=scratch,
      compiler_params=_PARAMS)(
          *rows, *passing, numbers, places.token, places.window, places.keys,
          places.queries)


def _statistics(query, key, places: _Places, spec: _Spec):
  """floor and best (B, K, G, L) of unscaled scores; visible (B, L)."""
  p = spec.predictor_dim
  query_1, key_1 = (x[..., :p].astype(jnp.float32) for x in (query, key))
  center = jnp.einsum("bkgle,bke->bkgl", query_1, key_1.mean(2),
                      precision="highest")

  number = jax.ShapeDtypeStruct(center.shape, jnp.float32)
  total, squares, best, count = _kernel(
      _measure, True, places, (query,), (key,), (center,), (number,) * 4, p)
  visible = count[:, 0, 0].astype(jnp.int32)
  table = jnp.asarray(quantile(spec.top_k, np.arange(key.shape[2] + 1)),
                      jnp.float32)
  at = table[visible][:, None, None]
  mean = total / count
  std = jnp.sqrt(jnp.maximum(squares / count - jnp.square(mean), 0))
  theta = jnp.where(at > -jnp.inf, center + mean + std * at, -jnp.inf)
  slack = 8 * jnp.finfo(jnp.float32).eps * jnp.linalg.norm(
      key_1, axis=-1).mean(2)[..., None, None] * jnp.linalg.norm(
          query_1, axis=-1)
  # What no query sees has the score -inf, below every floor.
  lowest = jnp.finfo(jnp.float32).min
  return jnp.maximum(jnp.minimum(theta, best - slack), lowest), best, visible


def _forward(query, key, value, places, spec):
  floor, best, visible = _statistics(query, key, places, spec)
  scale = spec.predictor_dim**-0.5
  shift = best * scale
  if spec.softcap:
    shift = spec.softcap * jnp.tanh(shift / spec.softcap)
  shift *= _LOG2_E
  width = query.shape[-1]
  number = jax.ShapeDtypeStruct(floor.shape, jnp.float32)
  out, normalizer, count = _kernel(
      functools.partial(_mix, _Scores(spec, width)), True, places, (query,),
      (key, value), (floor, shift),
      (jax.ShapeDtypeStruct(query.shape, query.dtype), number, number), width)
  log_sum = shift + jnp.log2(normalizer)
  return (out, count.mean((1, 2)), visible), (floor, log_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, places, spec):
  """Mixed values, keys kept, keys seen."""
  return _forward(query, key, value, places, spec)[0]


def _attend_fwd(query, key, value, places, spec):
  out, statistics = _forward(query, key, value, places, spec)
  return out, (query, key, value, places, out[0], *statistics)


def _attend_bwd(spec, residuals, gradients):
  query, key, value, places, out, floor, log_sum = residuals
  d_out, width = gradients[0], query.shape[-1]
  inner = _LOG2_E * (d_out.astype(jnp.float32) * out.astype(jnp.float32)
                     ).sum(-1)
  scores = _Scores(spec, width)

  def run(compute, over_keys, rows, passing, numbers):
    return _kernel(functools.partial(compute, scores), over_keys, places, rows,
                   passing, numbers, jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype), width)

  statistics = floor, log_sum
  d_query = run(_pull, True, (query, d_out), (key, value), (*statistics, inner))
  d_key = run(_pull, False, (key, value), (query, d_out), (*statistics, inner))
  d_value = run(_mix, False, (key,), (query, d_out), statistics)
  return d_query, d_key, d_value, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def spark_attention(query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, positions_BxL,
                    segments_BxL, window, predictor_dim, top_k, softcap,
                    block_q, block_k):
  """As `api.spark_attention`; its blocks are its own."""
  del block_q, block_k
  places = _places(positions_BxL, segments_BxL, window,
                   query_BxKxGxLxE.shape[2])
  return _attend(query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, places,
                 _Spec(predictor_dim, top_k, softcap))
