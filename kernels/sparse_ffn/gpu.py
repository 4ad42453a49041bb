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
# Neurons that are listed together: a lane a neuron, a bit a neuron.
_GROUP = 32
# Shared memory for rows of `up` and `down` of half a block: two blocks share a
# multiprocessor, so that their waits overlap.
_ROWS_BYTES = 50 * 1024
# What one block may have.
_SHARED_BYTES = 224 * 1024
# A copy's longest dimension.
_COLUMNS = 256
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# Of a vector, 32 numbers or a multiple, lane by lane; every warp has them all.
_LANES = plgpu.Layout.TILED(
    plgpu.Tiling(((_GROUP,), (1,))), warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,), vector_dim=-1)
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
  if not _batch([r.shape[1] for r in (up_FxU, down_FxD) if r is not None]):
    return f"rows of {down_FxD.shape[1]} numbers do not fit in shared memory"
  return None


def _batch(widths: list[int]) -> int:
  """How many neurons' rows, of such widths, one batch of copies brings.

  Two batches are in shared memory at a time; a warp multiplies a row of `up`,
  so at most four are of use.
  """
  *up, down = widths
  return max(rows for rows in range(5) if 2 * 2 * (
      4 * sum(up) + rows * down) <= _ROWS_BYTES)


def _predict_scratch(n: int, width: int) -> dict:
  """Shared memory of `_predict_tile`, for n tokens of R dims."""
  copies = min(_COPIES, width // _CHUNK)
  return dict(
      x_smem=plgpu.SMEM((n, width), jnp.bfloat16, transforms=_SWIZZLED),
      gate_smem=plgpu.SMEM((copies, TILE, _CHUNK), jnp.bfloat16,
                           transforms=_SWIZZLED),
      x_barrier=plgpu.Barrier(), barriers=plgpu.Barrier(num_barriers=copies))


def _predict_tile(x_gmem, gate_gmem, score_gmem, statistics_gmem, *, x_smem,
                  gate_smem, x_barrier, barriers) -> None:
  """Scores of this block's tile, their mean and squared deviations from it.

  Args:
    x_gmem: the tokens (B, D).
    gate_gmem: the gate (F, R).
    score_gmem: written, (F, n), n being B in whole eights.
    statistics_gmem: written, (2, t, n): means, then squares.
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

  mosaic_gpu.wait_for_kernel_before()
  mosaic_gpu.let_kernel_after_start()
  for chunk in range(copies):
    copy(chunk)
  # Rows beyond the tokens become 0. Literal bounds would be checked: 0 * tile.
  tokens = x_gmem.at[pl.ds(0 * tile, x_smem.shape[0]),
                     pl.ds(0, gate_gmem.shape[1])]
  plgpu.copy_gmem_to_smem(tokens, x_smem, x_barrier)
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
  square = (deviation * deviation).sum(0)
  for i, statistic in enumerate((mean, square)):
    mosaic_gpu.store(statistics_gmem.at[i, tile], statistic)


def _threshold(token, select, statistics_gmem, tiles) -> jax.Array:
  """A token's threshold, a scalar in the kernel."""
  mean, square = (mosaic_gpu.load(statistics_gmem.at[i, :, token], _LANES,
                                  optimized=False) for i in range(2))
  index = plgpu.broadcasted_iota(jnp.int32, mean.shape, 0, layout=_LANES)
  mean_of_all = jnp.where(index < tiles, mean, 0.0).sum() / tiles
  # Chan et al., 1979: squared deviations of parts, put together.
  apart = mean - mean_of_all
  square = jnp.where(index < tiles, square + TILE * apart * apart, 0.0).sum()
  return select.theta(mean_of_all, square, tiles * TILE)


def _accumulate_scratch(neurons: int, up_gmem, down_gmem) -> dict:
  """Shared memory of `_accumulate_block`, for a block's neurons."""
  gmems = dict(down=down_gmem) | ({} if up_gmem is None else dict(up=up_gmem))
  batch = _batch([math.prod(x.shape[1:]) for x in reversed(gmems.values())])
  scratch = dict(
      activation=plgpu.SMEM((2, neurons), jnp.float32),
      active=plgpu.SMEM((2, neurons), jnp.int32),
      hidden=plgpu.SMEM((2, 2, 4), jnp.float32),
      y_smem=plgpu.SMEM(down_gmem.shape[1:], jnp.float32),
      y_barrier=plgpu.Barrier())
  for name, gmem in gmems.items():
    rows = 4 if name == "up" else batch
    scratch[name] = plgpu.SMEM((2, 2, rows, *gmem.shape[1:]), jnp.bfloat16)
    scratch[f"{name}_barriers"] = plgpu.Barrier(num_arrivals=batch,
                                                num_barriers=4)
  return scratch


def _accumulate_block(select, up_activation, groups, score_gmem,
                      statistics_gmem, x_gmem, up_gmem, down_gmem, y_gmem,
                      count_gmem, *, y_smem, y_barrier, down_barriers,
                      up_barriers=None, **smem) -> None:
  """A token's output from this block's neurons, and how many of them fire.

  Two warpgroups have half of the neurons each.

  Args:
    select: `Elementwise` or `StatisticalTopk`.
    up_activation: of the other branch.
    groups: of neurons, in each half.
    score_gmem: the scores (F, n).
    statistics_gmem: as `_predict_tile` has left them.
    x_gmem: the tokens (B, D / 256, 256).
    up_gmem: (F, U / 256, 256); None in a plain layer.
    down_gmem: (F, D / 256, 256).
    y_gmem: written, (blocks, B, D / 256, 256) in float32.
    count_gmem: written, (blocks, 2, B), int32.
    y_smem: the second half's output.
    y_barrier: when it is there.
    down_barriers: when a batch of rows of `down` is there, two a half.
    up_barriers: likewise of `up`.
    **smem: for each half its neurons' activations, a list of the active ones,
      two batches of rows, and those neurons' activations, later times `up`'s.
  """
  block, token = lax.axis_index("block"), lax.axis_index("token")
  half = lax.axis_index("half")
  first_neuron = (2 * block + half) * groups * _GROUP
  activation_smem, active_smem, hidden_smem, down_smem, up_smem = (
      smem[name].at[half] if name in smem else None
      for name in ("activation", "active", "hidden", "down", "up"))
  neurons, batch = score_gmem.shape[0], down_smem.shape[1]
  mosaic_gpu.wait_for_kernel_before()
  scores = [mosaic_gpu.load(
      score_gmem.at[pl.ds(first_neuron + i * _GROUP, _GROUP), token],
      _LANES, optimized=False) for i in range(groups)]
  if up_gmem is not None:
    columns = up_gmem.shape[1]
    last = pl.ds(x_gmem.shape[1] - columns, columns)
    x = mosaic_gpu.load(x_gmem.at[token, last], _ROW_A_WARP.reduce(0),
                        optimized=False).astype(jnp.float32)
  if isinstance(select, StatisticalTopk):
    theta = _threshold(token, select, statistics_gmem, neurons // TILE)
    scores = [jnp.maximum(score - theta, 0.0) for score in scores]

  lane = plgpu.broadcasted_iota(jnp.int32, (_GROUP,), 0, layout=_LANES)
  masks = []
  for i, score in enumerate(scores):
    activation = mosaic_gpu.inlined(select.activation)(score)
    activation_smem[pl.ds(i * _GROUP, _GROUP)] = activation
    active = (activation != 0.0).astype(jnp.int32)
    # A bit a neuron: bits are quicker to walk than what lanes hold.
    masks.append(((active << lane).sum(), active.sum()))
  count = jnp.int32(0)
  for i, (bits, active) in enumerate(masks):

    def list_next(n, bits, group=i, listed=count):
      highest = 31 - lax.clz(bits)
      active_smem[listed + n] = group * _GROUP + highest
      return bits ^ (jnp.int32(1) << highest)

    lax.fori_loop(0, active, list_next, bits)
    count += active
  batches = pl.cdiv(count, batch)

  def ask(n):
    """Starts the copies of a batch's rows, each warp those of a neuron."""
    place = n % 2

    @plgpu.warp_map
    def _(warp):
      listed = n * batch + warp

      @pl.when((warp < batch) & (listed < count))
      def _():
        i = active_smem[listed]
        hidden_smem[place, warp] = activation_smem[i]
        row = first_neuron + i
        if up_gmem is not None:
          plgpu.copy_gmem_to_smem(up_gmem.at[row], up_smem.at[place, warp],
                                  up_barriers.at[2 * half + place])
        plgpu.copy_gmem_to_smem(down_gmem.at[row], down_smem.at[place, warp],
                                down_barriers.at[2 * half + place])

      @pl.when((warp < batch) & (listed >= count))
      def _():  # The barriers count whole batches.
        if up_gmem is not None:
          plgpu.barrier_arrive(up_barriers.at[2 * half + place])
        plgpu.barrier_arrive(down_barriers.at[2 * half + place])

  def multiply_up(place):
    """Multiplies a batch's activations with their `up` products.

    What no copy has filled may hold anything; nothing reads what it makes.
    """
    plgpu.barrier_wait(up_barriers.at[2 * half + place])
    rows = mosaic_gpu.load(up_smem.at[place], _ROW_A_WARP)
    x_rows = plgpu.layout_cast(lax.broadcast_in_dim(x, rows.shape, (1, 2)),
                               _ROW_A_WARP)
    product = (rows.astype(jnp.float32) * x_rows).sum(1).sum(1)
    hidden = mosaic_gpu.load(hidden_smem.at[place],
                             _ROW_A_WARP.reduce((1, 2)))
    hidden_smem[place] = hidden * mosaic_gpu.inlined(up_activation)(product)
    plgpu.commit_smem()

  def one_batch(n, y):
    place = n % 2
    if up_gmem is not None:
      multiply_up(place)
    plgpu.barrier_wait(down_barriers.at[2 * half + place])

    def add(i, y):
      row = down_smem[place, i].astype(jnp.float32)
      return y + hidden_smem[place, i] * row

    y = lax.fori_loop(0, jnp.minimum(count - n * batch, batch), add, y)
    plgpu.commit_smem()  # The rows have been read.
    pl.when(n + 2 < batches)(lambda: ask(n + 2))
    return y

  plgpu.commit_smem()  # The list is there.
  for n in range(2):
    pl.when(n < batches)(functools.partial(ask, n))
  shape = down_gmem.shape[1:]
  y = plgpu.layout_cast(jnp.zeros(shape, jnp.float32),
                        plgpu.Layout.WG_STRIDED(shape, 2))
  y = lax.fori_loop(0, batches, one_batch, y)
  count_gmem[block, half, token] = count

  @pl.when(half == 1)
  def _():
    y_smem[...] = y
    plgpu.commit_smem()
    plgpu.barrier_arrive(y_barrier)

  @pl.when(half == 0)
  def _():
    plgpu.barrier_wait(y_barrier)
    other = mosaic_gpu.load(y_smem, plgpu.Layout.WG_STRIDED(shape, 2))
    y_gmem[block, token] = y + other


def _kernel(body, out_type, grid, warpgroups, **scratch):
  """A kernel of `grid`, by name of its axes."""
  return plgpu.kernel(
      body, out_type=out_type, grid=tuple(grid.values()),
      grid_names=tuple(grid), num_threads=warpgroups, thread_name="half",
      scratch_types=scratch,
      compiler_params=mosaic_gpu.PARAMS)


def _columns(x: jax.Array) -> jax.Array:
  """A copy's dimensions are at most 256: a row is a few of those."""
  return x.reshape(x.shape[0], -1, _COLUMNS)


@jax.jit
def _predict(x_BxD, gate_FxR):
  """Scores (F, n); tiles' means and squared deviations (2, t, n); float32.

  Statistics beyond the tiles, up to a multiple of 32, are not written.
  """
  tokens, (neurons, width) = x_BxD.shape[0], gate_FxR.shape
  n = 8 * pl.cdiv(tokens, 8)  # The tensor cores' least is eight.
  if tokens > 8:  # A copy of more is of whole eights.
    x_BxD = jnp.pad(x_BxD, ((0, n - tokens), (0, 0)))
  tiles = neurons // TILE
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  out = f32((neurons, n)), f32((2, 32 * pl.cdiv(tiles, 32), n))
  return _kernel(_predict_tile, out, dict(tile=tiles), 1,
                 **_predict_scratch(n, width))(x_BxD, gate_FxR)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _accumulate(select, up_activation, score, statistics, x_BxD, up_FxU,
                down_FxD):
  """Partial sums (blocks, B, D / 256, 256), counts (blocks, 2, B)."""
  tokens = x_BxD.shape[0]
  pairs, down = score.shape[0] // (2 * _GROUP), _columns(down_FxD)
  rows = (down,) if up_FxU is None else (_columns(up_FxU), down)
  # With many tokens fewer blocks a token, so that less is left to add up.
  each = max(k for k in (1, 2, 4, 8) if k <= tokens and pairs % k == 0)
  blocks = pairs // each

  def body(score, statistics, x, *refs, **smem):
    *rows, y, count = refs
    up = rows[0] if len(rows) > 1 else None
    _accumulate_block(select, up_activation, each, score, statistics, x, up,
                      rows[-1], y, count, **smem)

  out = (jax.ShapeDtypeStruct((blocks, tokens, *down.shape[1:]), jnp.float32),
         jax.ShapeDtypeStruct((blocks, 2, tokens), jnp.int32))
  scratch = _accumulate_scratch(
      each * _GROUP, rows[0] if len(rows) > 1 else None, down)
  return _kernel(body, out, dict(block=blocks, token=tokens), 2, **scratch)(
      score, statistics, _columns(x_BxD), *rows)


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`; what it serves, `unsupported` says."""
  score, statistics = _predict(x_BxD, gate_FxR)
  if not isinstance(select, (Elementwise, StatisticalTopk)):
    # Of the whole row: XLA's work.
    score = select(score.T[:x_BxD.shape[0]]).T
    select = Elementwise(linear)
  y, count = _accumulate(select, up_activation, score, statistics, x_BxD,
                         up_FxU, down_FxD)
  y_BxD = y.sum(0).reshape(x_BxD.shape).astype(x_BxD.dtype)
  return y_BxD, count.sum((0, 1))
