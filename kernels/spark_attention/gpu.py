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


def _log2(x):
  return mosaic_gpu.log2(x)


def _soft(y):
  """log2(1 + 2^y)."""
  return jnp.maximum(y, 0.0) + _log2(1.0 + jnp.exp2(-jnp.abs(y)))


class _Side:
  """Of a kernel, which rows a warpgroup keeps, and which pass by.

  Attributes:
    over_keys: whether keys pass by queries, or queries by keys.
    b: this block's sequence.
    k: its key/value head.
    warpgroup: this one's number; the last one copies.
    first: the first step; `end`: the last step's successor.
  """

  def __init__(self, over_keys: bool, heads: int, places: _Places):
    self.over_keys, self._heads, self._places = over_keys, heads, places
    self.b, self.k = lax.axis_index("sequence"), lax.axis_index("head")
    self.warpgroup = lax.axis_index("warpgroup")
    pairs = lax.axis_size("pair")
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

  def seen(self, step):
    """The mask (rows, columns) of a step."""
    at_row, at_column = self.rows()[-1], self.columns(step)[-1]
    (row, row_segment), (column, column_segment) = (
        [_spread(mosaic_gpu.load(self._places.token.at[i, self.b, at], layout,
                                 optimized=False), axis) for i in range(2)]
        for axis, (at, layout) in enumerate(
            ((at_row, _ROW), (at_column, _COLUMN))))
    distance = row - column if self.over_keys else column - row
    return ((distance >= 0) & (distance < self._places.window[0])
            & (row_segment == column_segment))

  def vector(self, gmem, step):
    """A number for each query, spread over a product of tiles."""
    at, layout, axis = ((self.rows(), _ROW, 0) if self.over_keys else
                        (self.columns(step), _COLUMN, 1))
    return _spread(mosaic_gpu.load(gmem.at[at], layout, optimized=False), axis)


def _spread(x, axis: int):
  """Of rows (axis 0) or columns (axis 1) over a product of two tiles."""
  return lax.broadcast_in_dim(x, (TILE, TILE), (axis,))


class _Ring:
  """Tiles in shared memory, of `streams` arrays in turn.

  Tile n is of array n % streams. It is there from `wait` to `release`.
  """

  def __init__(self, slots, full, free):
    self._slots, self._full, self._free = slots, full, free
    self._count = slots.shape[0]

  def fill(self, gmems, side: _Side) -> None:
    """Copies every step's tiles as slots become free."""
    @pl.loop(side.first, side.end)
    def _(step):
      for i, gmem in enumerate(gmems):
        n = (step - side.first) * len(gmems) + i
        slot = lax.rem(n, jnp.int32(self._count))

        @pl.when(n >= self._count)
        def _():
          plgpu.barrier_wait(self._free.at[slot])

        width = self._slots.shape[-1]
        plgpu.copy_gmem_to_smem(
            gmem.at[(*side.columns(step), pl.ds(0, width))],
            self._slots.at[slot], self._full.at[slot])

  def wait(self, n):
    slot = lax.rem(n, jnp.int32(self._count))
    plgpu.barrier_wait(self._full.at[slot])
    return self._slots.at[slot]

  def release(self, n) -> None:
    plgpu.barrier_arrive(self._free.at[lax.rem(n, jnp.int32(self._count))])


def _transposed(ref):
  return plgpu.transpose_ref(ref, (1, 0))


def _product(x, y, dims):
  """x y' over some dims: (64, 64) in float32."""
  def multiply(accumulator):
    plgpu.wgmma(accumulator, x.at[:, dims], _transposed(y.at[:, dims]))
    return accumulator[...]

  return pl.run_scoped(multiply, plgpu.ACC((TILE, TILE), jnp.float32))


def _add_product(total, x, y):
  """total + x y, with x in registers."""
  def multiply(accumulator):
    plgpu.wgmma(accumulator, x.astype(jnp.bfloat16), y)

  return pl.run_state(multiply)(plgpu.ACC.init(total))


def _zeros(shape, layout):
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


class _Scores:
  """Of a tile of rows against a tile of columns."""

  def __init__(self, spec: _Spec, width: int):
    self.spec = spec
    self.predict = pl.ds(0, spec.predictor_dim)
    self.rest = pl.ds(spec.predictor_dim, width - spec.predictor_dim)
    self.scale_1 = spec.predictor_dim**-0.5
    self.scale_2 = (width - spec.predictor_dim)**-0.5

  def products(self, rows, columns):
    """Both scores, unscaled."""
    def multiply(*accumulators):
      for accumulator, dims in zip(accumulators, (self.predict, self.rest)):
        plgpu.wgmma(accumulator, rows.at[:, dims],
                    _transposed(columns.at[:, dims]))
      return [accumulator[...] for accumulator in accumulators]

    shape = plgpu.ACC((TILE, TILE), jnp.float32)
    return pl.run_scoped(multiply, shape, shape)

  def softmax(self, x, floor, shift, side, step):
    """p, which keys are kept, and tanh where there is a cap."""
    x = lax.cond(side.is_whole(step), lambda x: x,
                 lambda x: jnp.where(side.seen(step), x, -jnp.inf), x)
    kept = x >= floor
    tanh = None
    if self.spec.softcap:
      # From exponentials: the hardware's tanh has 11 bits.
      twice = 2 * _LOG2_E * self.scale_1 / self.spec.softcap
      tanh = 1.0 - 2.0 * jnp.exp2(-_log2(1.0 + jnp.exp2(x * twice)))
      exponent = tanh * (self.spec.softcap * _LOG2_E)
    else:
      exponent = x * (self.scale_1 * _LOG2_E)
    return jnp.where(kept, jnp.exp2(exponent - shift), 0.0), kept, tanh

  def gate(self, x):
    """s2 in base 2, and softplus of it."""
    y = x * (self.scale_2 * _LOG2_E)
    return y, _soft(y)


def _measure(side, ring, rows_smem, center_gmem, out_gmems):
  """Sums of scores and squares about the center, the best, how many seen."""
  center = side.vector(center_gmem, None)

  def step(i, carry):
    total, squares, best, visible = carry
    tile = ring.wait(i - side.first)
    x = _product(rows_smem, tile, pl.ds(0, rows_smem.shape[1]))
    ring.release(i - side.first)

    def whole(x):
      off = x - center
      return (off.sum(1), (off * off).sum(1), x.max(1),
              plgpu.layout_cast(jnp.full((TILE,), float(TILE)), _ROW))

    def part(x):
      seen = side.seen(i)
      off = jnp.where(seen, x - center, 0.0)
      return (off.sum(1), (off * off).sum(1),
              jnp.where(seen, x, -jnp.inf).max(1),
              jnp.where(seen, 1.0, 0.0).sum(1))

    a, b, c, d = lax.cond(side.is_whole(i), whole, part, x)
    return total + a, squares + b, jnp.maximum(best, c), visible + d

  zero = _zeros((TILE,), _ROW)
  results = lax.fori_loop(side.first, side.end, step,
                          (zero, zero, zero - jnp.inf, zero))
  for gmem, x in zip(out_gmems, results):
    mosaic_gpu.store(gmem.at[side.rows()], x)


def _mix(scores, side, ring, rows_smem, vectors, result):
  """Weights times what passes by: a query's values, a value's gradient.

  Args:
    scores: `_Scores`.
    side: `_Side`.
    ring: tiles of keys and values; or of queries and the result's gradient.
    rows_smem: the queries, or the keys.
    vectors: floor and shift of each query.
    result: called with the sums, the softmax's sum, how many keys are kept.
  """
  over_keys = side.over_keys

  def step(i, carry):
    n = 2 * (i - side.first)
    mixed, *sums = carry
    x_1, x_2 = scores.products(rows_smem, ring.wait(n))
    ring.release(n)
    floor, shift = (side.vector(gmem, i) for gmem in vectors)
    p, kept, _ = scores.softmax(x_1, floor, shift, side, i)
    _, gate = scores.gate(x_2)
    if over_keys:
      sums = [sums[0] + p.sum(1), sums[1] + jnp.where(kept, 1.0, 0.0).sum(1)]
    mixed = _add_product(mixed, p * gate, ring.wait(n + 1))
    ring.release(n + 1)
    return mixed, *sums

  start = [_zeros(rows_smem.shape, plgpu.Layout.WGMMA)]
  if over_keys:
    start += [_zeros((TILE,), _ROW)] * 2
  result(*lax.fori_loop(side.first, side.end, step, tuple(start)))


def _pull(scores, side, ring, rows_smem, other_smem, vectors):
  """The gradient of queries or keys, still in unscaled parts.

  Args:
    scores: `_Scores`.
    side: `_Side`.
    ring: tiles of keys and values; or of queries and the result's gradient.
    rows_smem: the queries, or the keys.
    other_smem: the result's gradient, or the values.
    vectors: floor, shift and inner of each query.
  """
  width = rows_smem.shape[1]

  def step(i, carry):
    n = 2 * (i - side.first)
    d_1, d_2 = carry
    tile = ring.wait(n)
    x_1, x_2 = scores.products(rows_smem, tile)
    floor, shift, inner = (side.vector(gmem, i) for gmem in vectors)
    other = ring.wait(n + 1)
    a = _product(other_smem, other, pl.ds(0, width))
    ring.release(n + 1)
    p, _, tanh = scores.softmax(x_1, floor, shift, side, i)
    y, gate = scores.gate(x_2)
    to_1 = p * (gate * a - inner)
    if tanh is not None:
      to_1 *= 1.0 - tanh * tanh
    # 2^(y - gate) is the slope of softplus, a sigmoid.
    to_2 = p * a * jnp.exp2(y - gate)
    d_1 = _add_product(d_1, to_1, tile.at[:, scores.predict])
    d_2 = _add_product(d_2, to_2, tile.at[:, scores.rest])
    ring.release(n)
    return d_1, d_2

  predict = scores.spec.predictor_dim
  d_1, d_2 = lax.fori_loop(side.first, side.end, step, tuple(
      _zeros((TILE, columns), plgpu.Layout.WGMMA)
      for columns in (predict, width - predict)))
  rows_smem[:, scores.predict] = (
      d_1 * (scores.scale_1 / _LOG2_E)).astype(jnp.bfloat16)
  rows_smem[:, scores.rest] = (d_2 * scores.scale_2).astype(jnp.bfloat16)


def _send(smem, gmem) -> None:
  """Copies a warpgroup's results out."""
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, gmem)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _kernel(compute, over_keys: bool, places: _Places, rows, passing, vectors,
            out_type, width: int):
  """Runs a kernel of the form that all have.

  Args:
    compute: (side, ring, rows' tiles, vectors, outputs), for a warpgroup.
    over_keys: as `_Side` has it.
    places: of the tokens.
    rows: arrays of which a warpgroup keeps a tile.
    passing: arrays whose tiles pass by.
    vectors: numbers (B, K, G, L) of each query.
    out_type: the outputs' types.
    width: columns of the arrays that are read, from the first.
  """
  queries = rows[0] if over_keys else passing[0]
  b, k, heads, length, _ = queries.shape
  tile_bytes = 2 * TILE * width
  slots = min(_TILES_BYTES // tile_bytes - _COMPUTE * len(rows), _MAX_SLOTS)
  tile = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16,
                           transforms=_SWIZZLED)
  scratch = dict(
      kept=[tile((_COMPUTE, TILE, width)) for _ in rows],
      slots=tile((slots, TILE, width)),
      kept_barrier=plgpu.Barrier(num_arrivals=len(rows),
                                 num_barriers=_COMPUTE),
      full=plgpu.Barrier(num_barriers=slots),
      free=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=slots))
  counts = len(rows), len(passing), len(vectors), 4

  def body(*refs, kept, slots, kept_barrier, full, free):
    parts, at = [], 0
    for count in counts:
      parts.append(refs[at:at + count])
      at += count
    row_gmems, passing_gmems, vector_gmems, place_gmems = parts
    side = _Side(over_keys, heads, _Places(*place_gmems))
    ring = _Ring(slots, full, free)

    @pl.when(side.warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(_REGISTERS, action="increase")
      tiles = [smem.at[side.warpgroup] for smem in kept]
      barrier = kept_barrier.at[side.warpgroup]
      for gmem, smem in zip(row_gmems, tiles):
        plgpu.copy_gmem_to_smem(gmem.at[(*side.rows(), pl.ds(0, width))], smem,
                                barrier)
      plgpu.barrier_wait(barrier)
      compute(side, ring, tiles, vector_gmems, refs[at:])

    @pl.when(side.warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
      ring.fill(passing_gmems, side)

  tiles = length // TILE * (heads if over_keys else 1)
  grid = dict(pair=tiles // _COMPUTE, sequence=b, head=k)
  return plgpu.kernel(
      body, out_type=out_type, grid=tuple(grid.values()),
      grid_names=tuple(grid), num_threads=_COMPUTE + 1,
      thread_name="warpgroup", scratch_types=scratch,
      compiler_params=_PARAMS)(
          *rows, *passing, *vectors, places.token, places.window, places.keys,
          places.queries)


def _statistics(query, key, places: _Places, spec: _Spec):
  """floor and best (B, K, G, L) of unscaled scores; visible (B, L)."""
  p = spec.predictor_dim
  query_1, key_1 = (x[..., :p].astype(jnp.float32) for x in (query, key))
  center = jnp.einsum("bkgle,bke->bkgl", query_1, key_1.mean(2),
                      precision="highest")

  def compute(side, ring, tiles, vectors, outs):
    _measure(side, ring, tiles[0], vectors[0], outs)

  number = jax.ShapeDtypeStruct(center.shape, jnp.float32)
  total, squares, best, count = _kernel(
      compute, True, places, (query,), (key,), (center,), (number,) * 4, p)
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
  scores = _Scores(spec, query.shape[-1])

  def compute(side, ring, tiles, vectors, outs):
    rows, (out_gmem, sum_gmem, count_gmem) = tiles[0], outs

    def result(mixed, normalizer, count):
      factor = lax.broadcast_in_dim(normalizer * _LOG2_E, mixed.shape, (0,))
      rows[...] = (mixed / factor).astype(jnp.bfloat16)
      mosaic_gpu.store(sum_gmem.at[side.rows()], normalizer)
      mosaic_gpu.store(count_gmem.at[side.rows()], count)
      _send(rows, out_gmem.at[side.rows()])

    _mix(scores, side, ring, rows, vectors, result)

  number = jax.ShapeDtypeStruct(floor.shape, jnp.float32)
  out, normalizer, count = _kernel(
      compute, True, places, (query,), (key, value), (floor, shift),
      (jax.ShapeDtypeStruct(query.shape, query.dtype), number, number),
      query.shape[-1])
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

  def pull(side, ring, tiles, vectors, outs):
    _pull(scores, side, ring, *tiles, vectors)
    _send(tiles[0], outs[0].at[side.rows()])

  def mix(side, ring, tiles, vectors, outs):
    def result(mixed):
      tiles[0][...] = (mixed * (1 / _LOG2_E)).astype(jnp.bfloat16)
      _send(tiles[0], outs[0].at[side.rows()])

    _mix(scores, side, ring, tiles[0], vectors, result)

  def run(compute, over_keys, rows, passing, vectors):
    out_type = (jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype),)
    return _kernel(compute, over_keys, places, rows, passing, vectors,
                   out_type, width)[0]

  statistics = floor, log_sum
  d_query = run(pull, True, (query, d_out), (key, value), (*statistics, inner))
  d_key = run(pull, False, (key, value), (query, d_out), (*statistics, inner))
  d_value = run(mix, False, (key,), (query, d_out), statistics)
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
