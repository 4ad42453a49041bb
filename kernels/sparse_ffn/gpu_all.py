"""The operation for more than 8 tokens: every row is read, on Hopper.

Together so many tokens activate nearly every neuron of one, so nothing is
skipped: rows of inactive neurons are multiplied by 0. What is left to gain is
that the threshold, the activation and the product of the branches take no time
of their own.

Three kernels stream a matrix each through the tensor cores; the weights are the
rows of a product and the tokens its columns, so that few tokens make little
work. The first leaves the scores of a tile of neurons, their mean and their
squared deviations. The second multiplies `up`; while its first copies are on
their way it makes thresholds of the tiles' statistics, and activations of
scores. The third multiplies `down`, some columns and some neurons a thread
block; XLA adds the blocks' sums in a fixed order. A block that has asked for
the last of its matrix asks for the beginning of the next one, so that memory
does not rest until the next kernel does so.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.sparse_ffn.gpu_scores import whole_eights
from sparse_lm.kernels.sparse_ffn.select import (Activation, Elementwise,
                                                 Select, StatisticalTopk,
                                                 linear)

# Columns of the tokens in one copy.
_CHUNK = 128
# Columns of `down` of one thread block, and neurons of `down` in one copy: few,
# so that splits are of nearly one size.
_COLUMNS = 128
_NEURONS = 64
# Shared memory of a block, which is alone on its multiprocessor.
_SHARED_BYTES = 224 * 1024
_PROCESSORS = 132
# Of what each thread block of a kernel reads, for how many bytes the kernel
# before asks: memory brings these 12 MB while one ends and the next one starts.
_AHEAD = 96 * 1024
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_WGMMA = plgpu.Layout.WGMMA
# Rows of an array in that layout.
_ROWS = 64


def _tile(neurons: int) -> int:
  """Neurons of a thread block: with 128, fewer blocks read the tokens."""
  return 128 if neurons % 128 == 0 else 64


def _whole(tiles: int) -> int:
  """Tiles, and what fills a layout's last rows; nothing is written there."""
  return _ROWS * pl.cdiv(tiles, _ROWS)


def _kernel(body, out_type, grid: tuple[int, ...], **scratch):
  return plgpu.kernel(body, out_type=out_type, grid=grid,
                      grid_names=("block", "split")[:len(grid)],
                      scratch_types=scratch, compiler_params=mosaic_gpu.PARAMS)


def _scratch(steps: int, tokens: tuple[int, int], rows: tuple[int, int],
             beside: int) -> dict:
  """Shared memory of `_start`.

  Args:
    steps: so many copies are made, at most.
    tokens: the shape of the tokens in one.
    rows: the shape of the weights in one.
    beside: bytes of shared memory that hold something else.
  """
  size = 2 * (math.prod(tokens) + math.prod(rows))
  places = min(steps, (_SHARED_BYTES - beside) // size)
  return dict(
      x_smem=plgpu.SMEM((places, *tokens), jnp.bfloat16, transforms=_SWIZZLED),
      rows_smem=plgpu.SMEM((places, *rows), jnp.bfloat16,
                           transforms=_SWIZZLED),
      barriers=plgpu.Barrier(num_arrivals=2, num_barriers=places))


def _start(first, end, tokens_at, rows_at, *, x_smem, rows_smem, barriers,
           transposed: bool, prefetch=lambda: None):
  """Starts to copy tokens and weights.

  Args:
    first: the first step.
    end: the last step's successor; like the first it may be traced.
    tokens_at: from a step to what it takes of the tokens, in global memory.
    rows_at: likewise of the weights.
    x_smem: places for tokens.
    rows_smem: places for weights.
    barriers: when both are there.
    transposed: whether a step's weights are (dims summed over, rows).
    prefetch: called when the last copy is on its way.

  Returns:
    A function that multiplies and adds up, to (rows, tokens) in float32.
  """
  places = barriers.shape[0]

  def copy(step):
    place = lax.rem(step - first, places)
    for gmem, smem in ((tokens_at(step), x_smem), (rows_at(step), rows_smem)):
      plgpu.copy_gmem_to_smem(gmem, smem.at[place], barriers.at[place])

  for i in range(places):
    pl.when(first + i < end)(functools.partial(copy, first + i))

  def run(accumulator):
    def step(i, _):
      place = lax.rem(i - first, places)
      rows = rows_smem.at[place]
      plgpu.barrier_wait(barriers.at[place])
      plgpu.wgmma(accumulator,
                  plgpu.transpose_ref(rows, (1, 0)) if transposed else rows,
                  plgpu.transpose_ref(x_smem.at[place], (1, 0)))
      plgpu.wgmma_wait(0)
      pl.when(i + places < end)(functools.partial(copy, i + places))
      pl.when(i == lax.max(first, end - places - 1))(prefetch)

    lax.fori_loop(first, end, step, None)
    return accumulator[...]

  shape = rows_smem.shape[2 if transposed else 1], x_smem.shape[1]
  return lambda: pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _splits(shape: tuple[int, int]) -> tuple[int, int, int]:
  """Of `down`: steps through its rows, blocks of columns, splits of steps."""
  steps, blocks = shape[0] // _NEURONS, shape[1] // _COLUMNS
  return steps, blocks, min(steps, max(1, _PROCESSORS // blocks))


def _prefetch_up(gmem) -> None:
  """Asks for the beginning of this block's tile of `up`, into the cache."""
  tile, size = lax.axis_index("block"), _tile(gmem.shape[0])
  width = min(gmem.shape[1], _AHEAD // (2 * size))
  for first in range(0, width, _CHUNK):
    plgpu.async_prefetch(gmem.at[pl.ds(tile * size, size),
                                 pl.ds(first, _CHUNK)])


def _prefetch_down(gmem) -> None:
  """Likewise, its share of what the blocks of `_down` will read first."""
  tiles = gmem.shape[0] // _tile(gmem.shape[0])
  steps, blocks, splits = _splits(gmem.shape)
  ahead = min(steps // splits, _AHEAD // (2 * _NEURONS * _COLUMNS))
  copies = blocks * splits * ahead
  for first in range(0, copies, tiles):
    copy = first + lax.axis_index("block")

    @pl.when(copy < copies)
    def _(copy=copy):
      step, block = copy // blocks, copy % blocks
      step = step % splits * steps // splits + step // splits
      plgpu.async_prefetch(gmem.at[pl.ds(step * _NEURONS, _NEURONS),
                                   pl.ds(block * _COLUMNS, _COLUMNS)])


def _load(gmem):
  return mosaic_gpu.load(gmem, _WGMMA, optimized=False)


def _in_rows(x, rows: int):
  """A number a token, in each row."""
  return plgpu.layout_cast(
      lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,)), _WGMMA)


def _add_tiles(x, tiles: int):
  """For each token, the sum over the tiles; what is beyond them is anything."""
  index = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_WGMMA)
  return jnp.where(index < tiles, x, 0.0).sum(0)


def _threshold(select: StatisticalTopk, statistics_gmem, tiles: int, size: int):
  """Each token's, of tiles of such a size."""
  means, squares = (_load(statistics_gmem.at[i]) for i in range(2))
  mean = _add_tiles(means, tiles) / tiles
  apart = means - _in_rows(mean, means.shape[0])
  # Chan et al., 1979: squared deviations of parts, put together.
  square = _add_tiles(squares + size * apart * apart, tiles)
  return select.theta(mean, square, tiles * size)


@jax.jit
def _scores(x_NxD, gate_FxR, up_FxU, down_FxD):
  """Scores (F, N), and of tiles means and squared deviations (2, t, N)."""
  tokens, (neurons, width) = x_NxD.shape[0], gate_FxR.shape
  size = _tile(neurons)
  tiles, steps = neurons // size, width // _CHUNK
  upcoming, prefetch = ((down_FxD, _prefetch_down) if up_FxU is None else
                        (up_FxU, _prefetch_up))

  def write_scores(x_gmem, gate_gmem, upcoming_gmem, score_gmem,
                   statistics_gmem, **smem):
    tile = lax.axis_index("block")
    rows = pl.ds(tile * size, size)

    def columns(step):
      return pl.ds(step * _CHUNK, _CHUNK)

    score = _start(0, steps, lambda i: x_gmem.at[:, columns(i)],
                   lambda i: gate_gmem.at[rows, columns(i)], **smem,
                   transposed=False,
                   prefetch=lambda: prefetch(upcoming_gmem))()
    mosaic_gpu.store(score_gmem.at[rows], score)
    mean = score.sum(0) / size
    deviation = score - _in_rows(mean, size)
    for i, x in enumerate((mean, (deviation * deviation).sum(0))):
      mosaic_gpu.store(statistics_gmem.at[i, tile], x)

  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  return _kernel(
      write_scores, (f32((neurons, tokens)), f32((2, _whole(tiles), tokens))),
      (tiles,), **_scratch(steps, (tokens, _CHUNK), (size, _CHUNK), 0))(
          x_NxD, gate_FxR, upcoming)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(select, up_activation, score_FxN, statistics, x_NxD, up_FxU,
            down_FxD):
  """What `down` multiplies (N, F), and each tile's active neurons (t, N)."""
  neurons, tokens = score_FxN.shape
  size = _tile(neurons)
  tiles, product, weights = neurons // size, {}, ()
  if up_FxU is not None:
    steps, weights = up_FxU.shape[1] // _CHUNK, (x_NxD, up_FxU, down_FxD)
    product = _scratch(steps, (tokens, _CHUNK), (size, _CHUNK),
                       2 * tokens * size)

  def write_hidden(score_gmem, statistics_gmem, *refs, hidden_smem, **smem):
    *weights_gmem, hidden_gmem, count_gmem = refs
    tile = lax.axis_index("block")
    rows = pl.ds(tile * size, size)
    multiply_up = None
    if weights_gmem:
      x_gmem, up_gmem, down_gmem = weights_gmem
      first = x_gmem.shape[1] - up_gmem.shape[1]
      multiply_up = _start(
          0, steps, lambda i: x_gmem.at[:, pl.ds(first + i * _CHUNK, _CHUNK)],
          lambda i: up_gmem.at[rows, pl.ds(i * _CHUNK, _CHUNK)], **smem,
          transposed=False, prefetch=lambda: _prefetch_down(down_gmem))
    hidden = _load(score_gmem.at[rows])
    if isinstance(select, StatisticalTopk):
      theta = _threshold(select, statistics_gmem, tiles, size)
      hidden = jnp.maximum(hidden - _in_rows(theta, size), 0.0)
    hidden = mosaic_gpu.inlined(select.activation)(hidden)
    mosaic_gpu.store(count_gmem.at[tile],
                     jnp.where(hidden != 0.0, 1.0, 0.0).sum(0))
    if multiply_up:
      hidden *= mosaic_gpu.inlined(up_activation)(multiply_up())
    plgpu.transpose_ref(hidden_smem, (1, 0))[...] = plgpu.layout_cast(
        hidden.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(hidden_smem, hidden_gmem.at[:, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = (jax.ShapeDtypeStruct((tokens, neurons), jnp.bfloat16),
         jax.ShapeDtypeStruct((_whole(tiles), tokens), jnp.float32))
  return _kernel(
      write_hidden, out, (tiles,), hidden_smem=plgpu.SMEM(
          (tokens, size), jnp.bfloat16, transforms=_SWIZZLED),
      **product)(score_FxN, statistics, *weights)


@jax.jit
def _down(hidden_NxF, count, down_FxD):
  """Partial sums (splits, N, D), float32; how many neurons are active (N,)."""
  (tokens, neurons), width = hidden_NxF.shape, down_FxD.shape[1]
  tiles, (steps, blocks, splits) = neurons // _tile(neurons), _splits(
      down_FxD.shape)

  def write_sums(hidden_gmem, count_gmem, down_gmem, y_gmem, active_gmem,
                 **smem):
    block, split = lax.axis_index("block"), lax.axis_index("split")
    columns = pl.ds(block * _COLUMNS, _COLUMNS)

    def rows(step):
      return pl.ds(step * _NEURONS, _NEURONS)

    multiply = _start(
        split * steps // splits, (split + 1) * steps // splits,
        lambda i: hidden_gmem.at[:, rows(i)],
        lambda i: down_gmem.at[rows(i), columns], **smem, transposed=True)

    @pl.when((block == 0) & (split == 0))
    def _():
      active = _add_tiles(_load(count_gmem), tiles)
      mosaic_gpu.store(active_gmem, active.astype(jnp.int32))

    y = plgpu.layout_cast(multiply(), plgpu.Layout.WGMMA_TRANSPOSED)
    mosaic_gpu.store(
        plgpu.transpose_ref(y_gmem.at[split, :, columns], (1, 0)), y)

  out = (jax.ShapeDtypeStruct((splits, tokens, width), jnp.float32),
         jax.ShapeDtypeStruct((tokens,), jnp.int32))
  return _kernel(
      write_sums, out, (blocks, splits),
      **_scratch(pl.cdiv(steps, splits), (tokens, _NEURONS),
                 (_NEURONS, _COLUMNS), 0))(hidden_NxF, count, down_FxD)


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`, for at most 64 tokens."""
  tokens = x_BxD.shape[0]
  more = (0, whole_eights(tokens) - tokens), (0, 0)  # A copy is of eights.
  x_NxD = jnp.pad(x_BxD, more)
  score_FxN, statistics = _scores(x_NxD, gate_FxR, up_FxU, down_FxD)
  if not isinstance(select, (Elementwise, StatisticalTopk)):
    # Of the whole row: XLA's work.
    score_FxN = jnp.pad(select(score_FxN.T[:tokens]), more).T
    select = Elementwise(linear)
  hidden_NxF, count = _hidden(select, up_activation, score_FxN, statistics,
                              x_NxD, up_FxU, down_FxD)
  y, active = _down(hidden_NxF, count, down_FxD)
  return y.sum(0)[:tokens].astype(x_BxD.dtype), active[:tokens]
