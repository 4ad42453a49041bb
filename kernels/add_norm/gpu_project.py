"""A token's sum, its norm and the norm's products with rows, on Hopper.

Every thread block asks for its rows, which take longer to come than one of its
warpgroups takes to make the token. Then each warp multiplies a row. Alone the
sum and norm take a kernel, of which most is waiting.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.add_norm.gpu_token import add_and_norm
from sparse_lm.kernels.mosaic_gpu import COLUMNS, LANES

# Warpgroups of a block, and warps of each.
_PARTS, _WARPS = 4, 4
# Shared memory for a block's rows: it is alone on its multiprocessor.
_ROWS_BYTES = 208 * 1024
# Of a token, (D / 256, 256): two columns of each row a thread.
_BY_THREAD = plgpu.Layout.TILED(
    plgpu.Tiling(((1, COLUMNS), (64,), (2,))), warp_dims=(-3,),
    lane_dims=(-2,), vector_dim=-1)


def _batches(rows: int) -> int:
  """How many times four rows each warpgroup has, one block a multiprocessor."""
  return pl.cdiv(rows, mosaic_gpu.PROCESSORS * _PARTS * _WARPS)


def takes_in_rows(x_NxD: jax.Array, rows_FxD: jax.Array) -> bool:
  """Whether `add_norm_and_project` serves, where `gpu.add_norm` does."""
  rows, columns = rows_FxD.shape
  of_block = _batches(rows) * _PARTS * _WARPS
  return (x_NxD.shape[0] == 1 and rows_FxD.dtype == jnp.bfloat16
          and rows % of_block == 0 and 2 * of_block * columns <= _ROWS_BYTES)


def _make_token(token_refs, epsilon: float, sums_smem, start_copies):
  """The sum and its norm, (D / 256, 256).

  Args:
    token_refs: x, y and two scales, likewise.
    epsilon: added to mean squares.
    sums_smem: (256,).
    start_copies: called when the token has been asked for: behind the copies
      it would come late.
  """
  arrays = [mosaic_gpu.load(ref, _BY_THREAD, optimized=False)
            for ref in token_refs]
  start_copies()

  def add_up(x):
    # By way of shared memory of its own: that of reductions is the block's.
    mosaic_gpu.store(sums_smem, x.sum(0))
    plgpu.commit_smem()
    total = mosaic_gpu.load(sums_smem, LANES, optimized=False).sum()
    plgpu.commit_smem()
    return total

  return add_and_norm(*arrays, epsilon, add_up)


def _project(epsilon, *refs, token_smem, sums_smem, rows_smem, token_barrier,
             rows_barriers) -> None:
  """Some rows: see `add_norm_and_project` for what the arrays are."""
  *token_refs, rows_gmem, sum_gmem, product_gmem = refs
  block, part = lax.axis_index("block"), lax.axis_index("part")
  batches = rows_smem.shape[1]
  firsts = [((block * _PARTS + part) * batches + i) * _WARPS
            for i in range(batches)]

  def start_copies():
    for i, first in enumerate(firsts):
      plgpu.copy_gmem_to_smem(
          rows_gmem.at[pl.ds(first, _WARPS)], rows_smem.at[part, i],
          rows_barriers.at[part * batches + i])

  @pl.when(part == 0)
  def _():
    total, norm = _make_token(token_refs, epsilon, sums_smem, start_copies)
    mosaic_gpu.store(token_smem, norm)
    plgpu.commit_smem()
    plgpu.barrier_arrive(token_barrier)
    pl.when(block == 0)(lambda: mosaic_gpu.store(sum_gmem, total))

  pl.when(part > 0)(start_copies)
  plgpu.barrier_wait(token_barrier)
  token = mosaic_gpu.load_row(token_smem)
  for i, first in enumerate(firsts):
    plgpu.barrier_wait(rows_barriers.at[part * batches + i])
    product = mosaic_gpu.row_products(rows_smem.at[part, i], token)
    mosaic_gpu.store(product_gmem.at[pl.ds(first, _WARPS)],
                     product.astype(jnp.bfloat16))


@functools.partial(jax.jit, static_argnums=5)
def add_norm_and_project(
    x_1xD: jax.Array, y_1xD: jax.Array, y_scale_D: jax.Array,
    scale_D: jax.Array, rows_FxD: jax.Array, epsilon: float
    ) -> tuple[jax.Array, jax.Array]:
  """As `api.add_norm_and_project`."""
  rows, columns = rows_FxD.shape
  pieces, batches = columns // COLUMNS, _batches(rows)
  token = [a.reshape(pieces, COLUMNS)
           for a in (x_1xD, y_1xD, y_scale_D, scale_D)]
  body = functools.partial(_project, epsilon)
  body.__name__ = "add_norm_and_project"
  total, product = plgpu.kernel(
      body,
      out_type=[jax.ShapeDtypeStruct(token[0].shape, x_1xD.dtype),
                jax.ShapeDtypeStruct((rows,), x_1xD.dtype)],
      grid=(rows // (batches * _PARTS * _WARPS),), grid_names=("block",),
      num_threads=_PARTS, thread_name="part",
      scratch_types=dict(
          token_smem=plgpu.SMEM((pieces, COLUMNS), x_1xD.dtype),
          sums_smem=plgpu.SMEM((COLUMNS,), jnp.float32),
          rows_smem=plgpu.SMEM((_PARTS, batches, _WARPS, pieces, COLUMNS),
                               rows_FxD.dtype),
          token_barrier=plgpu.Barrier(),
          rows_barriers=plgpu.Barrier(num_barriers=_PARTS * batches)),
      compiler_params=mosaic_gpu.PARAMS)(
          *token, rows_FxD.reshape(rows, pieces, COLUMNS))
  return total.reshape(x_1xD.shape), product[None]
