"""The operation for more than 8 tokens: every row is read, on Hopper.

Together so many tokens activate nearly every neuron of one, so nothing is
skipped: rows of inactive neurons are multiplied by 0. What is left to gain is
that the threshold, the activation and the product of the branches take no time
of their own.

Three kernels stream a matrix each through the tensor cores, tokens being the 64
rows of a product whatever their number. The first leaves the scores of a tile
of neurons, their mean and their squared deviations. The second multiplies `up`;
while its first copies are on their way it makes thresholds of the tiles'
statistics, and at the end activations of scores. The third multiplies `down`,
some columns and some neurons a thread block; XLA adds the blocks' sums in a
fixed order. When a kernel has read its matrix it asks for the beginning of the
next one, so that memory does not rest until the next kernel does so.
"""

import dataclasses
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

# Rows of a tensor core product: of tokens, and of what no token has filled.
# What those hold, anything, stays in their rows.
_ROWS = 64
# Columns of the tokens in one copy.
_CHUNK = 128
# Columns of `down` of one thread block.
_COLUMNS = 128
# Shared memory of a block, which is alone on its multiprocessor.
_SHARED_BYTES = 225 * 1024
_PROCESSORS = 132
# Of the copies of each thread block of a kernel, for how many the kernel before
# asks: memory brings these 12 MB while one ends and the next one starts.
_AHEAD = 3
# Tiles whose statistics are added up together.
_PIECE = 32
_SWIZZLE = plgpu.SwizzleTransform(128)
_BF16 = (plgpu.TilingTransform((8, 64)), _SWIZZLE)
_F32 = (plgpu.TilingTransform((8, 32)), _SWIZZLE)
_WGMMA = plgpu.Layout.WGMMA
# No sum here crosses warps: a warp has tokens of its own.
_PARAMS = dataclasses.replace(mosaic_gpu.PARAMS, reduction_scratch_bytes=0)


def _tile(neurons: int) -> int:
  """Neurons of a thread block: with 128, fewer blocks read the tokens."""
  return 128 if neurons % 128 == 0 else 64


def _pieces(tiles: int) -> int:
  """Tiles, in whole pieces."""
  return _PIECE * pl.cdiv(tiles, _PIECE)


def _kernel(body, out_type, grid: tuple[int, ...], warpgroups: int = 1,
            **scratch):
  parts = dict(num_threads=warpgroups, thread_name="part")
  return plgpu.kernel(body, out_type=out_type, grid=grid,
                      grid_names=("block", "split")[:len(grid)],
                      scratch_types=scratch, compiler_params=_PARAMS,
                      **parts if warpgroups > 1 else {})


def _scratch(steps: int, depth: int, rows: tuple[int, int], beside: int
             ) -> dict:
  """Shared memory of `_start`.

  Args:
    steps: so many copies are made, at most.
    depth: of the dims summed over, how many are in one.
    rows: the shape of the weights in one.
    beside: bytes of shared memory that hold something else.
  """
  tokens = _ROWS, depth
  size = 2 * (math.prod(tokens) + math.prod(rows))
  places = min(steps, (_SHARED_BYTES - beside) // size)
  return dict(
      x_smem=plgpu.SMEM((places, *tokens), jnp.bfloat16, transforms=_BF16),
      rows_smem=plgpu.SMEM((places, *rows), jnp.bfloat16, transforms=_BF16),
      barriers=plgpu.Barrier(num_arrivals=2, num_barriers=places))


def _start(first, end, tokens_at, rows_at, *, x_smem, rows_smem, barriers,
           transposed: bool):
  """Starts to copy tokens and weights.

  Args:
    first: the first step.
    end: the last step's successor; like the first it may be traced.
    tokens_at: from a step to what it takes of the tokens, in global memory.
    rows_at: likewise of the weights.
    x_smem: places for tokens.
    rows_smem: places for weights.
    barriers: when both are there.
    transposed: whether a step's weights are (neurons, dims summed over).

  Returns:
    A function that multiplies and adds up, to (64, N) in float32.
  """
  places = barriers.shape[0]

  def copy(step):
    place = lax.rem(step - first, places)
    tokens = tokens_at(step)
    for gmem, smem in ((tokens, x_smem.at[place, pl.ds(0, tokens.shape[0])]),
                       (rows_at(step), rows_smem.at[place])):
      plgpu.copy_gmem_to_smem(gmem, smem, barriers.at[place])

  for i in range(places):
    pl.when(first + i < end)(functools.partial(copy, first + i))

  def run(accumulator):
    def step(i, _):
      place = lax.rem(i - first, places)
      rows = rows_smem.at[place]
      plgpu.barrier_wait(barriers.at[place])
      plgpu.wgmma(accumulator, x_smem.at[place],
                  plgpu.transpose_ref(rows, (1, 0)) if transposed else rows)
      plgpu.wgmma_wait(0)
      pl.when(i + places < end)(functools.partial(copy, i + places))

    lax.fori_loop(first, end, step, None)
    return accumulator[...]

  columns = rows_smem.shape[1 if transposed else 2]
  return lambda: pl.run_scoped(run, plgpu.ACC((_ROWS, columns), jnp.float32))


def _splits(shape: tuple[int, int]) -> tuple[int, int, int]:
  """Of `down`: tiles of neurons, blocks of columns, splits of the tiles."""
  tiles, blocks = shape[0] // _tile(shape[0]), shape[1] // _COLUMNS
  return tiles, blocks, min(tiles, max(1, _PROCESSORS // blocks))


def _prefetch_up(gmem) -> None:
  """Asks for the beginning of this block's tile of `up`, into the cache."""
  tile, size = lax.axis_index("block"), _tile(gmem.shape[0])
  for i in range(min(_AHEAD, gmem.shape[1] // _CHUNK)):
    plgpu.async_prefetch(gmem.at[pl.ds(tile * size, size),
                                 pl.ds(i * _CHUNK, _CHUNK)])


def _prefetch_down(gmem) -> None:
  """Likewise, its share of what the blocks of `_down` will read first."""
  size, (tiles, blocks, splits) = _tile(gmem.shape[0]), _splits(gmem.shape)
  copies = blocks * splits * min(_AHEAD, tiles // splits)
  for first in range(0, copies, tiles):
    copy = first + lax.axis_index("block")

    @pl.when(copy < copies)
    def _(copy=copy):
      step, block = copy // blocks, copy % blocks
      step = step % splits * tiles // splits + step // splits
      plgpu.async_prefetch(gmem.at[pl.ds(step * size, size),
                                   pl.ds(block * _COLUMNS, _COLUMNS)])


def _send(x, smem, gmem) -> None:
  """Writes an array's first rows to global memory, by way of shared memory."""
  smem[...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, gmem.shape[0])], gmem)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _across(x, columns: int):
  """A number a token, for each of its columns."""
  return lax.broadcast_in_dim(x, (_ROWS, columns), (0,))


def _load_tiles(gmem, tiles: int) -> list:
  """Each token's numbers of all tiles, in pieces."""
  return [mosaic_gpu.load(gmem.at[:, pl.ds(first, _PIECE)], _WGMMA,
                          optimized=False)
          for first in range(0, tiles, _PIECE)]


def _add_tiles(pieces: list, tiles: int):
  """For each token, the sum over the tiles; nothing is written beyond them."""
  index = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _PIECE), 1, layout=_WGMMA)
  return sum(jnp.where(index < tiles - i * _PIECE, piece, 0.0)
             for i, piece in enumerate(pieces)).sum(1)


def _threshold(select: StatisticalTopk, statistics_gmem, tiles: int, size: int):
  """Each token's, of tiles of such a size."""
  means, squares = (_load_tiles(statistics_gmem.at[i], tiles)
                    for i in range(2))
  mean = _add_tiles(means, tiles) / tiles
  apart = [piece - _across(mean, _PIECE) for piece in means]
  # Chan et al., 1979: squared deviations of parts, put together.
  square = _add_tiles([piece + size * x * x
                       for piece, x in zip(squares, apart)], tiles)
  return select.theta(mean, square, tiles * size)


@jax.jit
def _scores(x_NxD, gate_FxR, up_FxU, down_FxD):
  """Scores (N, F); tiles' means and squared deviations (2, 64, t); float32."""
  upcoming = down_FxD if up_FxU is None else up_FxU
  neurons, width = gate_FxR.shape
  size = _tile(neurons)
  tiles, steps = neurons // size, width // _CHUNK

  def write_scores(x_gmem, gate_gmem, upcoming_gmem, score_gmem,
                   statistics_gmem, *, score_smem, **smem):
    tile = lax.axis_index("block")
    rows = pl.ds(tile * size, size)

    def columns(step):
      return pl.ds(step * _CHUNK, _CHUNK)

    score = _start(0, steps, lambda i: x_gmem.at[:, columns(i)],
                   lambda i: gate_gmem.at[rows, columns(i)], **smem,
                   transposed=True)()
    prefetch = _prefetch_down if up_FxU is None else _prefetch_up
    prefetch(upcoming_gmem)
    mean = score.sum(1) / size
    deviation = score - _across(mean, size)
    for i, x in enumerate((mean, (deviation * deviation).sum(1))):
      mosaic_gpu.store(statistics_gmem.at[i, :, tile], x)
    _send(score, score_smem, score_gmem.at[:, rows])

  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  out = f32((x_NxD.shape[0], neurons)), f32((2, _ROWS, _pieces(tiles)))
  return _kernel(
      write_scores, out, (tiles,),
      score_smem=plgpu.SMEM((_ROWS, size), jnp.float32, transforms=_F32),
      **_scratch(steps, _CHUNK, (size, _CHUNK), 4 * _ROWS * size))(
          x_NxD, gate_FxR, upcoming)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(select, up_activation, score_NxF, statistics, x_NxD, up_FxU,
            down_FxD):
  """What `down` multiplies (N, F), and each tile's active neurons (64, t)."""
  tokens, neurons = score_NxF.shape
  size = _tile(neurons)
  tiles, product, weights = neurons // size, {}, ()
  # A warpgroup of its own makes the thresholds while the other multiplies.
  topk = isinstance(select, StatisticalTopk)
  thresholds = dict(warpgroups=2, theta_barrier=plgpu.Barrier(),
                    theta_smem=plgpu.SMEM((_ROWS,), jnp.float32)) if topk else {}
  if up_FxU is not None:
    steps, weights = up_FxU.shape[1] // _CHUNK, (x_NxD, up_FxU, down_FxD)
    product = _scratch(steps, _CHUNK, (size, _CHUNK), (4 + 2) * _ROWS * size)

  def write_hidden(score_gmem, statistics_gmem, *refs, score_smem,
                   score_barrier, hidden_smem, theta_smem=None,
                   theta_barrier=None, **smem):
    *weights_gmem, hidden_gmem, count_gmem = refs
    tile = lax.axis_index("block")
    rows = pl.ds(tile * size, size)

    def find_thresholds():
      mosaic_gpu.store(theta_smem,
                       _threshold(select, statistics_gmem, tiles, size))
      plgpu.commit_smem()
      plgpu.barrier_arrive(theta_barrier)

    def multiply_and_activate():
      multiply_up = None
      if weights_gmem:
        x_gmem, up_gmem, down_gmem = weights_gmem
        first = x_gmem.shape[1] - up_gmem.shape[1]
        multiply_up = _start(
            0, steps, lambda i: x_gmem.at[:, pl.ds(first + i * _CHUNK, _CHUNK)],
            lambda i: up_gmem.at[rows, pl.ds(i * _CHUNK, _CHUNK)], **smem,
            transposed=True)
      plgpu.copy_gmem_to_smem(score_gmem.at[:, rows],
                              score_smem.at[pl.ds(0, tokens)], score_barrier)
      up = None
      if multiply_up:
        up = multiply_up()
        _prefetch_down(down_gmem)
      plgpu.barrier_wait(score_barrier)
      score = mosaic_gpu.load(score_smem, _WGMMA)
      if topk:
        plgpu.barrier_wait(theta_barrier)
        theta = mosaic_gpu.load(theta_smem, _WGMMA.reduce(1), optimized=False)
        score = jnp.maximum(score - _across(theta, size), 0.0)
      hidden = mosaic_gpu.inlined(select.activation)(score)
      mosaic_gpu.store(count_gmem.at[:, tile],
                       jnp.where(hidden != 0.0, 1.0, 0.0).sum(1))
      if up is not None:
        hidden *= mosaic_gpu.inlined(up_activation)(up)
      _send(hidden.astype(jnp.bfloat16), hidden_smem, hidden_gmem.at[:, rows])

    if topk:
      part = lax.axis_index("part")
      pl.when(part == 0)(multiply_and_activate)
      pl.when(part == 1)(find_thresholds)
    else:
      multiply_and_activate()

  out = (jax.ShapeDtypeStruct((tokens, neurons), jnp.bfloat16),
         jax.ShapeDtypeStruct((_ROWS, _pieces(tiles)), jnp.float32))
  return _kernel(
      write_hidden, out, (tiles,), score_barrier=plgpu.Barrier(),
      score_smem=plgpu.SMEM((_ROWS, size), jnp.float32, transforms=_F32),
      hidden_smem=plgpu.SMEM((_ROWS, size), jnp.bfloat16, transforms=_BF16),
      **thresholds, **product)(score_NxF, statistics, *weights)


@jax.jit
def _down(hidden_NxF, count, down_FxD):
  """Partial sums (splits, N, D), float32; how many neurons are active (64,)."""
  (tokens, neurons), width = hidden_NxF.shape, down_FxD.shape[1]
  chunk, (steps, blocks, splits) = _tile(neurons), _splits(down_FxD.shape)

  def write_sums(hidden_gmem, count_gmem, down_gmem, y_gmem, active_gmem, *,
                 y_smem, **smem):
    block, split = lax.axis_index("block"), lax.axis_index("split")
    columns = pl.ds(block * _COLUMNS, _COLUMNS)

    def rows(step):
      return pl.ds(step * chunk, chunk)

    multiply = _start(
        split * steps // splits, (split + 1) * steps // splits,
        lambda i: hidden_gmem.at[:, rows(i)],
        lambda i: down_gmem.at[rows(i), columns], **smem, transposed=False)

    @pl.when((block == 0) & (split == 0))
    def _():
      active = _add_tiles(_load_tiles(count_gmem, steps), steps)
      mosaic_gpu.store(active_gmem, active.astype(jnp.int32))

    _send(multiply(), y_smem, y_gmem.at[split, :, columns])

  out = (jax.ShapeDtypeStruct((splits, tokens, width), jnp.float32),
         jax.ShapeDtypeStruct((_ROWS,), jnp.int32))
  return _kernel(
      write_sums, out, (blocks, splits),
      y_smem=plgpu.SMEM((_ROWS, _COLUMNS), jnp.float32, transforms=_F32),
      **_scratch(pl.cdiv(steps, splits), chunk, (chunk, _COLUMNS),
                 4 * _ROWS * _COLUMNS))(hidden_NxF, count, down_FxD)


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`, for at most 64 tokens."""
  tokens = x_BxD.shape[0]
  more = (0, -tokens % 8), (0, 0)  # A copy is of eights.
  x_NxD = jnp.pad(x_BxD, more)
  score_NxF, statistics = _scores(x_NxD, gate_FxR, up_FxU, down_FxD)
  if not isinstance(select, (Elementwise, StatisticalTopk)):
    # Of the whole row: XLA's work.
    score_NxF = jnp.pad(select(score_NxF[:tokens]), more)
    select = Elementwise(linear)
  hidden_NxF, count = _hidden(select, up_activation, score_NxF, statistics,
                              x_NxD, up_FxU, down_FxD)
  y, active = _down(hidden_NxF, count, down_FxD)
  return y.sum(0)[:tokens].astype(x_BxD.dtype), active[:tokens]
