"""Inside the GPU kernels: a tile's scores, and the threshold of them all."""

from collections.abc import Callable
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.add_norm.gpu_token import (add, load_token,
                                                  rms_factor, scaled)
from sparse_lm.kernels.mosaic_gpu import LANES
from sparse_lm.kernels.sparse_ffn.select import StatisticalTopk

# Neurons of a tile: the rows of the smallest tensor core product.
TILE = 64
# Tokens of a product, fewer being filled up: the tensor cores' least.
TOKENS = 8
# Columns of the gate, and of x, in one copy; four swizzled tiles of 128 bytes.
CHUNK = 256
# Chunks of the gate on their way, of 32 KB.
_COPIES = 2
# Of shared memory.
BYTES = 2 * _COPIES * (TILE + TOKENS) * CHUNK + 4 * TILE * TOKENS
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# Of (8, 256): 64 columns a warp, four rows at a time.
_EIGHT = plgpu.Layout.TILED(
    plgpu.Tiling(((TOKENS, CHUNK), (4, 64), (8,))), warp_dims=(-4,),
    lane_dims=(-3, -2), vector_dim=-1)


def scratch(width: int, added: bool = False) -> dict:
  """Shared memory of `multiply_gate`, for gates of R dims.

  Args:
    width: R.
    added: whether the block makes x itself, whole; it copies chunks otherwise.
  """
  chunks = width // CHUNK
  copies = min(_COPIES, chunks)
  return dict(
      x_smem=plgpu.SMEM((chunks if added else copies, TOKENS, CHUNK),
                        jnp.bfloat16, transforms=_SWIZZLED),
      gate_smem=plgpu.SMEM((copies, TILE, CHUNK), jnp.bfloat16,
                           transforms=_SWIZZLED),
      score_smem=plgpu.SMEM((TILE, TOKENS), jnp.float32),
      chunk_barriers=plgpu.Barrier(num_arrivals=1 if added else 2,
                                   num_barriers=copies))


def multiply_gate(tile, get_x, gate_gmem, *, x_smem, gate_smem, score_smem,
                  chunk_barriers):
  """Leaves a tile's scores in shared memory.

  Args:
    tile: which one, traced.
    get_x: the tokens (B, D) in global memory, at most 8; or a function that
      leaves them in x_smem, and returns one to be called while the last chunks
      are on their way.
    gate_gmem: the gate (F, R).
    x_smem: chunks of x's columns.
    gate_smem: chunks of the tile's columns.
    score_smem: written, (64, 8).
    chunk_barriers: when the chunks are there.

  Returns:
    What that second function does, if there is one.
  """
  rows = pl.ds(tile * TILE, TILE)
  # Those beyond the tokens become 0. Literal bounds would be checked: 0 * tile.
  tokens = pl.ds(0 * tile, TOKENS)
  chunks, copies = gate_gmem.shape[1] // CHUNK, gate_smem.shape[0]
  copied = [(gate_gmem, rows, gate_smem)]
  if not callable(get_x):
    copied.append((get_x, tokens, x_smem))

  def copy(chunk):
    slot, columns = chunk % copies, pl.ds(chunk * CHUNK, CHUNK)
    for gmem, lines, smem in copied:
      plgpu.copy_gmem_to_smem(gmem.at[lines, columns], smem.at[slot],
                              chunk_barriers.at[slot])

  def multiply(meanwhile, accumulator):
    for chunk in range(chunks):
      slot = chunk % copies
      plgpu.barrier_wait(chunk_barriers.at[slot])
      plgpu.wgmma(accumulator, gate_smem.at[slot], plgpu.transpose_ref(
          x_smem.at[chunk % x_smem.shape[0]], (1, 0)))
      plgpu.wgmma_wait(0)
      if chunk + copies < chunks:
        copy(chunk + copies)
      if chunk == copies - 1:
        result = meanwhile()
    mosaic_gpu.store(score_smem, accumulator[...])
    return result

  for chunk in range(copies):
    copy(chunk)
  meanwhile = get_x(x_smem) if callable(get_x) else lambda: None
  result = pl.run_scoped(functools.partial(multiply, meanwhile),
                         plgpu.ACC(score_smem.shape, jnp.float32))
  plgpu.commit_smem()
  return result


def put_and_norm(refs, epsilon: float, sum_gmem, norm_gmem, token_smem, x_smem
                 ) -> Callable[[], tuple[jax.Array, jax.Array]]:
  """The one token is norm(x + norm(y)): a kernel less, while the gate comes.

  Norms multiply by factors that are known late. So the gate multiplies what
  those do, x (1 + scale) and y (1 + y_scale) (1 + scale), as two tokens;
  `write_scores` puts the scores together.

  Args:
    refs: x, y and the scales of the norms of y and of the sum, (D,).
    epsilon: added to mean squares.
    sum_gmem: written by the first block, (D,): x + norm(y).
    norm_gmem: likewise, its norm.
    token_smem: (2, D) in bfloat16, to put things in.
    x_smem: written, as `multiply_gate` has it.

  Returns:
    What makes the rest, and the factors of the norms of y and of the sum.
  """
  x, y, y_scale, scale = load_token(refs)
  for i, token in enumerate((x, y.astype(jnp.float32) * (1.0 + y_scale))):
    mosaic_gpu.store(token_smem.at[i], scaled(token, 1.0, scale))
  plgpu.commit_smem()
  row = plgpu.broadcasted_iota(jnp.int32, x_smem.shape[1:], 0, layout=_EIGHT)
  for chunk in range(x_smem.shape[0]):
    # Four times: the tensor cores take no fewer.
    first, second = (plgpu.layout_cast(lax.broadcast_in_dim(
        mosaic_gpu.load(token_smem.at[i, pl.ds(chunk * CHUNK, CHUNK)],
                        _EIGHT.reduce(0), optimized=False), row.shape, (1,)),
                                       _EIGHT) for i in (0, 1))
    mosaic_gpu.store(x_smem.at[chunk],
                     jnp.where(row % 2 == 0, first, second))
  plgpu.commit_smem()

  def finish():
    y_factor = rms_factor(y, epsilon)
    total = add(x, scaled(y, y_factor, y_scale))
    factor = rms_factor(total, epsilon)

    @pl.when(lax.axis_index("block") == 0)
    def _():
      mosaic_gpu.store(sum_gmem, total)
      mosaic_gpu.store(norm_gmem, scaled(total, factor, scale))

    return y_factor, factor

  return finish


def write_scores(get_x, gate_gmem, score_gmem, statistics_gmem, *,
                 score_smem, **smem) -> None:
  """A kernel's body: a tile's scores, their mean and deviations from it.

  Args:
    get_x: as for `multiply_gate`, like the gate; a function: what
      `put_and_norm` is but for its last argument.
    gate_gmem: the gate.
    score_gmem: written, (B, F).
    statistics_gmem: written, (2, B, t): means, then squared deviations.
    score_smem: as `scratch` has it.
    **smem: likewise.
  """
  tile = lax.axis_index("block")
  factors = multiply_gate(tile, get_x, gate_gmem, score_smem=score_smem, **smem)

  def load(token):
    return mosaic_gpu.load(score_smem.at[:, token], LANES, optimized=False)

  for token in range(score_gmem.shape[0]):
    score = load(token)
    if factors:
      y_factor, factor = factors
      score = factor * (score + y_factor * load(1))
    mosaic_gpu.store(score_gmem.at[token, pl.ds(tile * TILE, TILE)], score)
    mean = score.sum() / TILE
    deviation = score - mean
    statistics_gmem[0, token, tile] = mean
    statistics_gmem[1, token, tile] = (deviation * deviation).sum()


def threshold(token, select: StatisticalTopk, statistics_gmem, tiles: int
              ) -> jax.Array:
  """A token's threshold, a scalar in the kernel.

  Args:
    token: which one, traced.
    select: the rule.
    statistics_gmem: as `write_scores` has left them.
    tiles: how many there are.
  """
  mean, square = (mosaic_gpu.load(statistics_gmem.at[i, token], LANES,
                                  optimized=False) for i in range(2))
  index = plgpu.broadcasted_iota(jnp.int32, mean.shape, 0, layout=LANES)
  mean_of_all = jnp.where(index < tiles, mean, 0.0).sum() / tiles
  # Chan et al., 1979: squared deviations of parts, put together.
  apart = mean - mean_of_all
  square = jnp.where(index < tiles, square + TILE * apart * apart, 0.0).sum()
  return select.theta(mean_of_all, square, tiles * TILE)
