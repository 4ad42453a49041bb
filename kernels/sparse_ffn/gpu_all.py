"""The operation for more than 8 tokens: every row is read, on Hopper.

Together so many tokens activate nearly every neuron of one, so nothing is
skipped: rows of inactive neurons are multiplied by 0. What is left to gain is
that the threshold, the activation and the product of the branches take little
time of their own.

Three kernels and a sum. The first streams `gate` and `up` through the tensor
cores, tokens being the 64 rows of a product whatever their number, and leaves
both products of a tile of neurons, the scores' mean and their squared
deviations.
The second makes thresholds of the tiles' statistics, and of scores what `down`
multiplies. The third streams `down`, some columns and some neurons a thread
block; `gpu_sums` adds the blocks' sums.
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
from sparse_lm.kernels.gpu_functions import inlined
from sparse_lm.kernels.sparse_ffn import gpu_sums
from sparse_lm.kernels.sparse_ffn.select import (Activation, Elementwise,
                                                 Select, StatisticalTopk)

# Rows of a tensor core product: of tokens, and of what no token has filled.
# What those hold, anything, stays in their rows.
_ROWS = 64
# Columns of the tokens in one copy.
_CHUNK = 128
# Columns of `down` of one thread block.
_COLUMNS = 128
# Shared memory of a block, which is alone on its multiprocessor.
_SHARED_BYTES = 225 * 1024
# Tiles whose statistics are added up together.
_PIECE = 32
_SWIZZLE = plgpu.SwizzleTransform(128)
_BF16 = (plgpu.TilingTransform((8, 64)), _SWIZZLE)
_F32 = (plgpu.TilingTransform((8, 32)), _SWIZZLE)
_WGMMA = plgpu.Layout.WGMMA
# Tokens of a block of the second kernel, two a warp: of (8, 32) or longer rows.
_EIGHT = 8
_TOKENS = plgpu.Layout.TILED(
    plgpu.Tiling(((_EIGHT, 32), (2, 32), (2,))), warp_dims=(-5,),
    lane_dims=(-3, -2), vector_dim=-1)
# No sum here crosses warps: a warp has tokens of its own.
_PARAMS = dataclasses.replace(mosaic_gpu.PARAMS, reduction_scratch_bytes=0)


def _tile(neurons: int) -> int:
  """Neurons of a thread block: with 128, fewer blocks read the tokens."""
  return 128 if neurons % 128 == 0 else 64


def _kernel(body, out_type, grid: tuple[int, ...], **scratch):
  return plgpu.kernel(body, out_type=out_type, grid=grid,
                      grid_names=("block", "split")[:len(grid)],
                      scratch_types=scratch, compiler_params=_PARAMS)


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


def _start(segments, *, x_smem, rows_smem, barriers, transposed: bool):
  """Starts to copy tokens and weights.

  Args:
    segments: of each matrix the first step, the last one's successor, from a
      step to what it takes of the tokens, in global memory, and of the weights.
      Steps may be traced; a matrix begins where the one before ends.
    x_smem: places for tokens.
    rows_smem: places for weights.
    barriers: when both are there.
    transposed: whether a step's weights are (neurons, dims summed over).

  Returns:
    For each matrix, in turn, a function that multiplies it and adds up, to
    (64, N) in float32.
  """
  places, origin = barriers.shape[0], segments[0][0]

  def copy(step):
    place = lax.rem(step - origin, places)

    def start(tokens_at, rows_at):
      tokens = tokens_at(step)
      for gmem, smem in (
          (tokens, x_smem.at[place, pl.ds(0, tokens.shape[0])]),
          (rows_at(step), rows_smem.at[place])):
        plgpu.copy_gmem_to_smem(gmem, smem, barriers.at[place])

    for first, end, *sources in segments:
      pl.when((step >= first) & (step < end))(
          functools.partial(start, *sources))

  for i in range(places):
    copy(origin + i)

  def run(first, end, accumulator):
    def step(i, _):
      place = lax.rem(i - origin, places)
      rows = rows_smem.at[place]
      plgpu.barrier_wait(barriers.at[place])
      plgpu.wgmma(accumulator, x_smem.at[place],
                  plgpu.transpose_ref(rows, (1, 0)) if transposed else rows)
      plgpu.wgmma_wait(0)
      copy(i + places)

    lax.fori_loop(first, end, step, None)
    return accumulator[...]

  columns = rows_smem.shape[1 if transposed else 2]
  return [functools.partial(pl.run_scoped, functools.partial(run, *segment[:2]),
                            plgpu.ACC((_ROWS, columns), jnp.float32))
          for segment in segments]


def _splits(shape: tuple[int, int]) -> tuple[int, int, int]:
  """Of `down`: tiles of neurons, blocks of columns, splits of the tiles."""
  tiles, blocks = shape[0] // _tile(shape[0]), shape[1] // _COLUMNS
  return tiles, blocks, min(tiles, max(1, mosaic_gpu.PROCESSORS // blocks))


def _send(x, smem, gmem) -> None:
  """Writes an array's first rows to global memory, by way of shared memory."""
  smem[...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, gmem.shape[0])], gmem)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _across(x, shape: tuple[int, int], layout=_WGMMA):
  """A number a token, for each of its columns."""
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0,)), layout)


def _load_tiles(gmem, tiles: int) -> list:
  """Each token's numbers of all tiles, in pieces."""
  return [mosaic_gpu.load(gmem.at[:, pl.ds(first, _PIECE)], _TOKENS,
                          optimized=False)
          for first in range(0, tiles, _PIECE)]


def _add_tiles(pieces: list, tiles: int):
  """For each token, the sum over the tiles; nothing is written beyond them."""
  index = plgpu.broadcasted_iota(jnp.int32, pieces[0].shape, 1, layout=_TOKENS)
  return sum(jnp.where(index < tiles - i * _PIECE, piece, 0.0)
             for i, piece in enumerate(pieces)).sum(1)


def _threshold(select: StatisticalTopk, statistics, tiles: int, size: int):
  """Each token's, of tiles of such a size.

  Args:
    select: the rule.
    statistics: pieces of the tiles' means, and of squared deviations.
    tiles: how many there are.
    size: of each.
  """
  means, squares = statistics
  mean = _add_tiles(means, tiles) / tiles
  apart = [piece - _across(mean, piece.shape, _TOKENS) for piece in means]
  # Chan et al., 1979: squared deviations of parts, put together.
  square = _add_tiles([piece + size * x * x
                       for piece, x in zip(squares, apart)], tiles)
  return select.theta(mean, square, tiles * size)


@jax.jit
def _products(x_NxD, gate_FxR, up_FxU):
  """Scores and, if there is one, products of `up` (N, F); statistics.

  Those are tiles' means and squared deviations (2, 64, t). All in float32 but
  for the products of `up`, which nothing is compared with, in bfloat16.
  """
  (neurons, width), tokens = gate_FxR.shape, x_NxD.shape[0]
  size = _tile(neurons)
  tiles = neurons // size
  weights = [x for x in (gate_FxR, up_FxU) if x is not None]
  ends = [sum(x.shape[1] for x in weights[:n]) // _CHUNK
          for n in range(len(weights) + 1)]
  types = [(jnp.float32, _F32), (jnp.bfloat16, _BF16)][:len(weights)]

  def write_products(x_gmem, *refs, y_smems, **smem):
    gmems = refs[:len(weights)]
    *y_gmems, statistics_gmem = refs[len(weights):]
    tile = lax.axis_index("block")
    rows = pl.ds(tile * size, size)

    def segment(n):
      # The gate multiplies the first dims of the tokens, `up` the last.
      skipped = n * (x_gmem.shape[1] - gmems[n].shape[1])

      def columns(i, skipped=0):
        return pl.ds(skipped + (i - ends[n]) * _CHUNK, _CHUNK)

      return (ends[n], ends[n + 1], lambda i: x_gmem.at[:, columns(i, skipped)],
              lambda i: gmems[n].at[rows, columns(i)])

    multiply, *multiply_up = _start(
        [segment(n) for n in range(len(weights))], **smem, transposed=True)
    score = multiply()
    mean = score.sum(1) / size
    deviation = score - _across(mean, score.shape)
    for i, x in enumerate((mean, (deviation * deviation).sum(1))):
      mosaic_gpu.store(statistics_gmem.at[i, :, tile], x)
    _send(score, y_smems[0], y_gmems[0].at[:, rows])
    for multiply in multiply_up:
      _send(multiply().astype(jnp.bfloat16), y_smems[1], y_gmems[1].at[:, rows])

  statistics = jax.ShapeDtypeStruct(
      (2, _ROWS, _PIECE * pl.cdiv(tiles, _PIECE)), jnp.float32)
  *products, statistics = _kernel(
      write_products,
      [*(jax.ShapeDtypeStruct((tokens, neurons), dtype) for dtype, _ in types),
       statistics], (tiles,),
      y_smems=[plgpu.SMEM((_ROWS, size), dtype, transforms=transforms)
               for dtype, transforms in types],
      **_scratch(ends[-1], _CHUNK, (size, _CHUNK), 6 * _ROWS * size))(
          x_NxD, *weights)
  return products, statistics


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(select, up_activation, products, statistics):
  """What `down` multiplies (N, F), and blocks' active neurons (N, blocks).

  `select` is None where scores are activations already, which XLA has made.
  """
  tokens, neurons = products[0].shape
  tiles, size = neurons // _tile(neurons), _tile(neurons)
  columns = next(n for n in (512, 256, 128, 64) if neurons % n == 0)
  grid = neurons // columns, tokens // _EIGHT

  def write_hidden(*refs):
    product_gmems, refs = refs[:len(products)], refs[len(products):]
    statistics_gmem, hidden_gmem, count_gmem = refs
    block, eight = lax.axis_index("block"), lax.axis_index("split")
    rows = pl.ds(eight * _EIGHT, _EIGHT)
    where = rows, pl.ds(block * columns, columns)
    statistics = [_load_tiles(statistics_gmem.at[i, rows], tiles)
                  for i in range(2)]
    score, *up = (mosaic_gpu.load(gmem.at[where], _TOKENS, optimized=False)
                  for gmem in product_gmems)
    if isinstance(select, StatisticalTopk):
      theta = _threshold(select, statistics, tiles, size)
      score = jnp.maximum(score - _across(theta, score.shape, _TOKENS), 0.0)
    hidden = score
    if select is not None:
      hidden = inlined(select.activation, _TOKENS)(score)
    mosaic_gpu.store(count_gmem.at[rows, block],
                     jnp.where(hidden != 0.0, 1.0, 0.0).sum(1))
    for product in up:
      hidden *= inlined(up_activation, _TOKENS)(product.astype(jnp.float32))
    mosaic_gpu.store(hidden_gmem.at[where], hidden.astype(jnp.bfloat16))
    plgpu.commit_smem()  # All have read. What XLA has made is XLA's.
    for gmem in product_gmems[select is None:]:
      mosaic_gpu.discard(gmem.at[rows], block * columns, (_EIGHT, columns),
                         neurons)

  out = (jax.ShapeDtypeStruct((tokens, neurons), jnp.bfloat16),
         jax.ShapeDtypeStruct((tokens, grid[0]), jnp.float32))
  return _kernel(write_hidden, out, grid)(*products, statistics)


@jax.jit
def _down(hidden_NxF, down_FxD):
  """Partial sums (splits, N, D), float32."""
  (tokens, neurons), width = hidden_NxF.shape, down_FxD.shape[1]
  chunk, (steps, blocks, splits) = _tile(neurons), _splits(down_FxD.shape)

  def write_sums(hidden_gmem, down_gmem, y_gmem, *, y_smem, **smem):
    block, split = lax.axis_index("block"), lax.axis_index("split")
    columns = pl.ds(block * _COLUMNS, _COLUMNS)

    def rows(step):
      return pl.ds(step * chunk, chunk)

    multiply, = _start(
        [(split * steps // splits, (split + 1) * steps // splits,
          lambda i: hidden_gmem.at[:, rows(i)],
          lambda i: down_gmem.at[rows(i), columns])], **smem, transposed=False)
    _send(multiply(), y_smem, y_gmem.at[split, :, columns])

  out = jax.ShapeDtypeStruct((splits, tokens, width), jnp.float32)
  return _kernel(
      write_sums, out, (blocks, splits),
      y_smem=plgpu.SMEM((_ROWS, _COLUMNS), jnp.float32, transforms=_F32),
      **_scratch(pl.cdiv(steps, splits), chunk, (chunk, _COLUMNS),
                 4 * _ROWS * _COLUMNS))(hidden_NxF, down_FxD)


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`, for at most 64 tokens."""
  tokens = x_BxD.shape[0]
  more = (0, -tokens % _EIGHT), (0, 0)  # A copy is of eights.
  products, statistics = _products(jnp.pad(x_BxD, more), gate_FxR, up_FxU)
  if not isinstance(select, (Elementwise, StatisticalTopk)):
    # Of the whole row: XLA's work.
    products[0], select = jnp.pad(select(products[0][:tokens]), more), None
  hidden_NxF, count = _hidden(select, up_activation, products, statistics)
  y = _down(hidden_NxF, down_FxD)
  y = gpu_sums.add_up(y.reshape(y.shape[0], -1), x_BxD.dtype)
  return (y.reshape(-1, x_BxD.shape[1])[:tokens],
          count.sum(1)[:tokens].astype(jnp.int32))
