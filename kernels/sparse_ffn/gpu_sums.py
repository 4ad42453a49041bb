"""Inside the GPU kernels: what thread blocks leave, added up and forgotten.

Partial sums are megabytes that are read once. Left in the L2 cache they are
written to memory when weights push them out, and weights wait for that: on an
H200 the next kernels of a layer take 0.5 us longer. So they are discarded.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu

# Rows up to which a thread adds a column up; of more, four warps share them.
_FEW = 64


def _layout(*tiling):
  return plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=(-3,),
                            lane_dims=(-2,), vector_dim=-1)


# By how many warps share a column: of what they load, (n, warps, columns), and
# of their sums, (n, columns).
_LAYOUTS = {
    1: (_layout((1, 1, 128), (32,), (1,)), mosaic_gpu.COLUMN_A_THREAD),
    4: (_layout((1, 4, 32), (1,)), mosaic_gpu.COLUMN_A_LANE)}


def _split(rows: int) -> tuple[int, int] | None:
  """Warpgroups, and warps of each, that share rows; None where none can."""
  warps = 4 if rows > _FEW else 1
  if rows % warps or not 2 * warps <= rows <= warps * _FEW:
    return None
  # Two rows or more each: jax 0.10 loads no single ones.
  each = rows // warps
  return next(n for n in (4, 3, 2, 1) if each % n == 0 and each > n), warps


@functools.partial(jax.jit, static_argnums=1)
def _add_up(y_PxC, dtype):
  (rows, columns), (parts, warps) = y_PxC.shape, _split(y_PxC.shape[0])
  width, (load_layout, sum_layout) = 128 // warps, _LAYOUTS[warps]

  def add_partial_sums(y_gmem, total_gmem, *, sum_smem, barrier):
    block, part = lax.axis_index("block"), lax.axis_index("part")
    mine = pl.ds(block * width, width)
    mosaic_gpu.store(
        sum_smem.at[pl.ds(part * warps, warps)],
        mosaic_gpu.load(y_gmem.at[part, :, :, mine], load_layout,
                        optimized=False).sum(0))
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    mosaic_gpu.discard(y_gmem.at[part], block * width, (rows // parts, width),
                       columns)

    @pl.when(part == 0)
    def _():
      plgpu.barrier_wait(barrier)
      total = mosaic_gpu.load(sum_smem, sum_layout, optimized=False).sum(0)
      mosaic_gpu.store(total_gmem.at[mine], total.astype(dtype))

  return plgpu.kernel(
      add_partial_sums, out_type=jax.ShapeDtypeStruct((columns,), dtype),
      grid=(columns // width,), grid_names=("block",),
      num_threads=parts, thread_name="part",
      scratch_types=dict(
          sum_smem=plgpu.SMEM((parts * warps, width), jnp.float32),
          barrier=plgpu.Barrier(num_arrivals=parts)),
      compiler_params=mosaic_gpu.PARAMS)(
          y_PxC.reshape(parts, -1, warps, columns))


def add_up(y_PxC: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Sums (C,) of columns, in float32 and in a fixed order.

  Args:
    y_PxC: float32, a multiple of 128 columns; nobody may read it afterwards.
    dtype: of the sums.
  """
  if _split(y_PxC.shape[0]) is None:
    return y_PxC.sum(0).astype(dtype)
  return _add_up(y_PxC, dtype)
