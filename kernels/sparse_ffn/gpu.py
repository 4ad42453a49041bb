"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

Two kernels. The first multiplies the gate: it streams all of it, a tile of
neurons a thread block, through the tensor cores, and leaves each tile's mean
and squared deviations beside the scores. In the second each thread block takes
one token and a tile, or a few where there are many tokens: it adds the tiles'
statistics up to the threshold, makes activations of its scores, and asks for
the rows of `up` and `down` of every active neuron at once, in copies that run
by themselves. As rows arrive it multiplies and adds. Each block leaves a
partial sum, and XLA adds those in a fixed order: no atomics, the same result
every time.

One kernel with a barrier between the two halves was no faster on an H200: what
it saves in starting, the barrier and clearing its counter take.

However many neurons of a tile are active, all are computed: those that find no
slot in shared memory wait for the next round.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.sparse_ffn.select import (Activation, Elementwise,
                                                 Select, StatisticalTopk,
                                                 linear)

# Up to so many tokens it is no slower than reading everything, on an H200.
FASTER_UP_TO = 8
# Neurons of a tile: the rows of the smallest tensor core product.
TILE = 64
# Columns of the gate in one copy; 2 bytes each, four swizzled tiles of 128.
_CHUNK = 256
# Copies of the gate on their way, of 32 KB.
_COPIES = 2
# Shared memory for rows of `up` and `down`. Two blocks share a multiprocessor:
# more and they would not, with less more tiles have rows that wait.
_ROWS_BYTES = 108 * 1024
# The same for several tokens: four blocks, whose waits overlap.
_ROWS_BYTES_BATCH = 52 * 1024
# What one block may have.
_SHARED_BYTES = 224 * 1024
# A copy's longest dimension.
_COLUMNS = 256
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# A number for each neuron of a tile, or for each tile: 64 or a multiple.
_COLUMN = plgpu.Layout.WGMMA.reduce(1)
# Of eight rows of x, two rows a warp: 4 columns a thread.
_TOKENS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,),
    lane_dims=(-3, -2), vector_dim=-1)
# Of four rows, a row a warp: (4, columns / 256, 256), 8 columns a thread.
_ROW_A_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 1, _COLUMNS), (8,))), warp_dims=(-4,), lane_dims=(-2,),
    vector_dim=-1)


def unsupported(x_BxD: jax.Array, gate_FxR: jax.Array,
                up_FxU: jax.Array | None, down_FxD: jax.Array) -> str | None:
  """As `api.unsupported`."""
  if {x_BxD.dtype, gate_FxR.dtype} != {jnp.dtype(jnp.bfloat16)}:
    return f"needs bfloat16, not {x_BxD.dtype} and {gate_FxR.dtype}"
  if not 1 <= x_BxD.shape[0] <= 64:
    return f"serves 1 to 64 tokens, not {x_BxD.shape[0]}"
  sizes = [("F", gate_FxR.shape[0], TILE), ("R", gate_FxR.shape[1], _CHUNK),
           ("D", x_BxD.shape[1], _COLUMNS)]
  if up_FxU is not None:
    sizes.append(("U", up_FxU.shape[1], _COLUMNS))
  for name, size, unit in sizes:
    if size % unit:
      return f"needs {name} to be a multiple of {unit}, not {size}"
  tokens, width = x_BxD.shape[0], gate_FxR.shape[1]
  of_x = 2 * 8 * pl.cdiv(tokens, 8) * width
  if of_x + _COPIES * 2 * TILE * _CHUNK > _SHARED_BYTES:
    return f"{tokens} tokens of {width} numbers do not fit in shared memory"
  if not _slots(tokens, [r.shape[1] for r in (up_FxU, down_FxD)
                         if r is not None]):
    return f"rows of {down_FxD.shape[1]} numbers do not fit in shared memory"
  return None


def _slots(tokens: int, widths: list[int]) -> int:
  """How many neurons' rows, of such widths, are in shared memory at a time."""
  budget = _ROWS_BYTES if tokens == 1 else _ROWS_BYTES_BATCH
  return min(TILE, budget // (2 * sum(widths)))


def _predict_scratch(n: int, width: int) -> dict:
  """Shared memory of `_predict_tile`, for n tokens of R dims."""
  copies = min(_COPIES, width // _CHUNK)
  return dict(
      x_smem=plgpu.SMEM((n, width), jnp.bfloat16, transforms=_SWIZZLED),
      gate_smem=plgpu.SMEM((copies, TILE, _CHUNK), jnp.bfloat16,
                           transforms=_SWIZZLED),
      x_barrier=plgpu.Barrier(), barriers=plgpu.Barrier(num_barriers=copies))


def _predict_tile(x_gmem, gate_gmem, score_gmem, mean_gmem, square_gmem, *,
                  x_smem, gate_smem, x_barrier, barriers) -> None:
  """Scores of this block's tile, their mean and squared deviations from it.

  Args:
    x_gmem: the tokens (n, D), or one: each of n is that one then.
    gate_gmem: the gate (F, R).
    score_gmem: written, (F, n).
    mean_gmem: written, (t, n).
    square_gmem: written, (t, n).
    x_smem: all of x.
    gate_smem: chunks of the tile's columns.
    x_barrier: when x is there.
    barriers: when a chunk is there.
  """
  tile = lax.axis_index("tile")
  rows = pl.ds(tile * TILE, TILE)
  chunks, copies = gate_gmem.shape[1] // _CHUNK, gate_smem.shape[0]

  def copy(chunk):
    slot = chunk % copies
    plgpu.copy_gmem_to_smem(
        gate_gmem.at[rows, pl.ds(chunk * _CHUNK, _CHUNK)], gate_smem.at[slot],
        barriers.at[slot])

  for chunk in range(copies):
    copy(chunk)
  columns = pl.ds(0, gate_gmem.shape[1])
  if x_gmem.shape[0] == 1:
    x = mosaic_gpu.load(x_gmem.at[0, columns], _TOKENS.reduce(0),
                        optimized=False)
    x_smem[...] = plgpu.layout_cast(
        lax.broadcast_in_dim(x, x_smem.shape, (1,)), _TOKENS)
    plgpu.commit_smem()
  else:
    plgpu.copy_gmem_to_smem(x_gmem.at[:, columns], x_smem, x_barrier)
    plgpu.barrier_wait(x_barrier)

  def multiply(accumulator):
    for chunk in range(chunks):
      slot = chunk % copies
      plgpu.barrier_wait(barriers.at[slot])
      x = x_smem.at[:, pl.ds(chunk * _CHUNK, _CHUNK)]
      plgpu.wgmma(accumulator, gate_smem.at[slot],
                  plgpu.transpose_ref(x, (1, 0)))
      plgpu.wgmma_wait(0)
      if chunk + copies < chunks:
        copy(chunk + copies)
    return accumulator[...]

  score = pl.run_scoped(
      multiply, plgpu.ACC((TILE, x_smem.shape[0]), jnp.float32))
  mosaic_gpu.store(score_gmem.at[rows], score)
  mean = score.sum(0) / TILE
  deviation = score - lax.broadcast_in_dim(mean, score.shape, (1,))
  mosaic_gpu.store(mean_gmem.at[tile], mean)
  mosaic_gpu.store(square_gmem.at[tile], (deviation * deviation).sum(0))


def _threshold(token, select, mean_gmem, square_gmem, tiles) -> jax.Array:
  """A token's threshold, a scalar in the kernel."""
  mean, square = (mosaic_gpu.load(x.at[:, token], _COLUMN, optimized=False)
                  for x in (mean_gmem, square_gmem))
  index = plgpu.broadcasted_iota(jnp.int32, mean.shape, 0, layout=_COLUMN)
  mean_of_all = jnp.where(index < tiles, mean, 0.0).sum() / tiles
  # Chan et al., 1979: squared deviations of parts, put together.
  apart = mean - mean_of_all
  square = jnp.where(index < tiles, square + TILE * apart * apart, 0.0).sum()
  return select.theta(mean_of_all, square, tiles * TILE)


def _accumulate_scratch(tokens: int, up_gmem, down_gmem) -> dict:
  """Shared memory of `_accumulate_block`."""
  gmems = dict(down=down_gmem) | ({} if up_gmem is None else dict(up=up_gmem))
  slots = _slots(tokens, [math.prod(x.shape[1:]) for x in gmems.values()])
  groups = pl.cdiv(slots, 4)
  scratch = dict(
      activation_smem=plgpu.SMEM((TILE,), jnp.float32),
      active_smem=plgpu.SMEM((TILE,), jnp.int32),
      hidden_smem=plgpu.SMEM((4 * groups,), jnp.float32))
  for name, gmem in gmems.items():
    rows = 4 * groups if name == "up" else slots
    scratch[f"{name}_smem"] = plgpu.SMEM((rows, *gmem.shape[1:]), jnp.bfloat16)
    scratch[f"{name}_barriers"] = plgpu.Barrier(num_barriers=slots)
  return scratch


def _accumulate_block(select, up_activation, tiles, score_gmem, mean_gmem,
                      square_gmem, x_gmem, up_gmem, down_gmem, y_gmem,
                      count_gmem, *, activation_smem, active_smem, hidden_smem,
                      down_smem, down_barriers, up_smem=None,
                      up_barriers=None) -> None:
  """A token's output from this block's tiles of neurons, and how many fire.

  Args:
    select: `Elementwise` or `StatisticalTopk`.
    up_activation: of the other branch.
    tiles: how many are this block's.
    score_gmem: the scores (F, n).
    mean_gmem: as `_predict_tile` has left them, as are the squares.
    square_gmem: the squares.
    x_gmem: the tokens (n, D / 256, 256).
    up_gmem: (F, U / 256, 256); None in a plain layer.
    down_gmem: (F, D / 256, 256).
    y_gmem: written, (blocks, B, D / 256, 256) in float32.
    count_gmem: written, (blocks, B), int32.
    activation_smem: of a tile.
    active_smem: the active neurons of a tile, in order.
    hidden_smem: activations of the rows in the slots, later times `up`'s.
    down_smem: rows of `down`, a slot each.
    down_barriers: when such a row is there.
    up_smem: rows of `up`, a slot each.
    up_barriers: when such a row is there.
  """
  block, token = lax.axis_index("block"), lax.axis_index("token")
  neurons, slots = score_gmem.shape[0], down_smem.shape[0]
  if up_gmem is not None:
    columns = up_gmem.shape[1]
    last = pl.ds(x_gmem.shape[1] - columns, columns)
    x = mosaic_gpu.load(x_gmem.at[token, last], _ROW_A_WARP.reduce(0),
                        optimized=False).astype(jnp.float32)
  if isinstance(select, StatisticalTopk):
    theta = _threshold(token, select, mean_gmem, square_gmem, neurons // TILE)

  def list_active(tile):
    """Writes a tile's activations and list; how many are active."""
    score = mosaic_gpu.load(score_gmem.at[pl.ds(tile * TILE, TILE), token],
                            _COLUMN, optimized=False)
    if isinstance(select, StatisticalTopk):
      score = jnp.maximum(score - theta, 0.0)
    activation_smem[...] = mosaic_gpu.inlined(select.activation)(score)
    plgpu.commit_smem()
    activations = [activation_smem[i] for i in range(TILE)]
    count = jnp.int32(0)
    for i, a in enumerate(activations):
      # Without a branch: the next active neuron overwrites an inactive one.
      active_smem[count] = jnp.int32(i)
      count += (a != 0).astype(jnp.int32)
    return count

  def ask(tile, first, slot):
    """Starts the copies of an active neuron's rows."""
    i = active_smem[first + slot]
    row = tile * TILE + i
    if up_gmem is not None:
      plgpu.copy_gmem_to_smem(up_gmem.at[row], up_smem.at[slot],
                              up_barriers.at[slot])
    plgpu.copy_gmem_to_smem(down_gmem.at[row], down_smem.at[slot],
                            down_barriers.at[slot])
    hidden_smem[slot] = activation_smem[i]

  def multiply_up(group, here):
    """Multiplies four neurons' activations with their `up` products.

    What no copy has filled may hold anything; nothing reads what it makes.
    """
    for i in range(4):
      slot = group * 4 + i

      @pl.when(slot < here)
      def _():
        plgpu.barrier_wait(up_barriers.at[slot])
    four = pl.ds(group * 4, 4)
    rows = mosaic_gpu.load(up_smem.at[four], _ROW_A_WARP)
    x_rows = plgpu.layout_cast(lax.broadcast_in_dim(x, rows.shape, (1, 2)),
                               _ROW_A_WARP)
    product = (rows.astype(jnp.float32) * x_rows).sum(1).sum(1)
    hidden = mosaic_gpu.load(hidden_smem.at[four], _ROW_A_WARP.reduce((1, 2)))
    hidden_smem[four] = hidden * mosaic_gpu.inlined(up_activation)(product)

  def add_down(slot, y):
    plgpu.barrier_wait(down_barriers.at[slot])
    return y + hidden_smem[slot] * down_smem[slot].astype(jnp.float32)

  def one_round(i, y, tile, count):
    first = i * slots
    here = jnp.minimum(count - first, slots)
    groups = pl.cdiv(here, 4)
    plgpu.commit_smem()  # The list is there; last round's rows have been read.
    pl.loop(0, here)(lambda slot: ask(tile, first, slot))
    if up_gmem is not None:
      plgpu.commit_smem()
      pl.loop(0, groups)(lambda group: multiply_up(group, here))
    plgpu.commit_smem()
    return lax.fori_loop(0, here, add_down, y)

  def one_tile(i, carry):
    y, total = carry
    tile = block * tiles + i
    count = list_active(tile)
    y = lax.fori_loop(0, pl.cdiv(count, slots),
                      lambda i, y: one_round(i, y, tile, count), y)
    plgpu.commit_smem()
    return y, total + count

  shape = down_gmem.shape[1:]
  y = plgpu.layout_cast(jnp.zeros(shape, jnp.float32),
                        plgpu.Layout.WG_STRIDED(shape, 2))
  y_gmem[block, token], count_gmem[block, token] = lax.fori_loop(
      0, tiles, one_tile, (y, jnp.int32(0)))


def _kernel(body, out_type, grid, **scratch):
  """A kernel of `grid`, by name of its axes."""
  return plgpu.kernel(
      body, out_type=out_type, grid=tuple(grid.values()),
      grid_names=tuple(grid), scratch_types=scratch,
      compiler_params=mosaic_gpu.PARAMS)


def _columns(x: jax.Array) -> jax.Array:
  """A copy's dimensions are at most 256: a row is a few of those."""
  return x.reshape(x.shape[0], -1, _COLUMNS)


@jax.jit
def _predict(x_nxD, gate_FxR):
  """Scores (F, n), tiles' means and squared deviations (t, n), in float32.

  Rows of t beyond the tiles, up to a multiple of 64, are not written.
  """
  n, (neurons, width) = 8 * pl.cdiv(x_nxD.shape[0], 8), gate_FxR.shape
  tiles = neurons // TILE
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  statistics = f32((64 * pl.cdiv(tiles, 64), n))
  return _kernel(
      _predict_tile, (f32((neurons, n)), statistics, statistics),
      dict(tile=tiles), **_predict_scratch(n, width))(x_nxD, gate_FxR)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _accumulate(tokens, select, up_activation, score, mean, square, x_nxD,
                up_FxU, down_FxD):
  """Partial sums (blocks, B, D / 256, 256), counts (blocks, B)."""
  tiles, down = score.shape[0] // TILE, _columns(down_FxD)
  rows = (down,) if up_FxU is None else (_columns(up_FxU), down)
  # With many tokens fewer blocks a token, so that less is left to add up.
  each = max(k for k in (1, 2, 3, 4) if k <= max(1, tokens // 2)
             and tiles % k == 0)
  blocks = tiles // each

  def body(score, mean, square, x, *refs, **smem):
    *rows, y, count = refs
    up = rows[0] if len(rows) > 1 else None
    _accumulate_block(select, up_activation, each, score, mean, square, x, up,
                      rows[-1], y, count, **smem)

  out = (jax.ShapeDtypeStruct((blocks, tokens, *down.shape[1:]), jnp.float32),
         jax.ShapeDtypeStruct((blocks, tokens), jnp.int32))
  scratch = _accumulate_scratch(tokens, rows[0] if len(rows) > 1 else None,
                                down)
  return _kernel(body, out, dict(block=blocks, token=tokens), **scratch)(
      score, mean, square, _columns(x_nxD), *rows)


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`; what it serves, `unsupported` says."""
  tokens = x_BxD.shape[0]
  # The tensor cores' least; one token the kernel repeats by itself.
  missing = -tokens % 8 if tokens > 1 else 0
  x_nxD = jnp.pad(x_BxD, ((0, missing), (0, 0)))
  score, mean, square = _predict(x_nxD, gate_FxR)
  if not isinstance(select, (Elementwise, StatisticalTopk)):
    # Of the whole row: XLA's work.
    score, select = select(score.T).T, Elementwise(linear)
  y, count = _accumulate(tokens, select, up_activation, score, mean, square,
                         x_nxD, up_FxU, down_FxD)
  return y.sum(0).reshape(x_BxD.shape).astype(x_BxD.dtype), count.sum(0)
