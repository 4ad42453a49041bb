"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

Up to 8 tokens are served here; of more, which `gpu_all` serves, every row is
read.

Three kernels. The first multiplies the gate: it streams all of it, a tile of
neurons a thread block, through the tensor cores, and leaves each tile's mean
and squared deviations beside the scores. For one token it can make what it
multiplies as well, adding up the residual stream and norming it while the gate
is on its way. In the second each warpgroup takes one token and a few neurons:
it adds the tiles' statistics up to the threshold, makes activations of its
scores, lists the active neurons and asks for their rows of `up` and `down`, in
copies that run by themselves. As rows arrive it multiplies and adds. A block
adds its warpgroups' sums, and the third, small kernel those of the blocks, in a
fixed order: no atomics, the same result every time.

Where each neuron decides by itself, one token needs one kernel in place of the
first two: a block goes on from its tile's scores to its rows. With a threshold
of all neurons in between, one kernel with a barrier was no faster on an H200:
what it saves in starting, the barrier and clearing its counter take.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import gpu_functions, mosaic_gpu
from sparse_lm.kernels.add_norm import gpu as add_norm
from sparse_lm.kernels.gpu_functions import inlined
from sparse_lm.kernels.mosaic_gpu import COLUMNS, LANES
from sparse_lm.kernels.sparse_ffn import (gpu_all, gpu_rows, gpu_scores,
                                          gpu_sums)
from sparse_lm.kernels.sparse_ffn.gpu_rows import GROUP
from sparse_lm.kernels.sparse_ffn.gpu_scores import CHUNK, TILE
from sparse_lm.kernels.sparse_ffn.select import (Activation, Elementwise,
                                                 Select, StatisticalTopk,
                                                 linear)

# Of more tokens, together, too few neurons are inactive to be worth finding.
_ROW_BY_ROW_UP_TO = gpu_scores.TOKENS
# Shared memory for the rows of a warpgroup. Two blocks of two warpgroups share
# a multiprocessor, so that their waits overlap; so do two of the one kernel,
# whose rows lie beside the gate's chunks.
_ROWS_BYTES = 48 * 1024
_ROWS_BYTES_OF_ONE = 34 * 1024
# Where rows are too long for that a block is alone, and has so much in all.
_SHARED_BYTES = 220 * 1024


def unsupported(x_BxD: jax.Array, gate_FxR: jax.Array,
                up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
                up_activation: Activation) -> str | None:
  """As `api.unsupported`."""
  types = {str(a.dtype) for a in (x_BxD, gate_FxR, up_FxU, down_FxD)
           if a is not None}
  if types != {"bfloat16"}:
    return f"needs bfloat16, not {' and '.join(sorted(types))}"
  if not 1 <= x_BxD.shape[0] <= 64:
    return f"serves 1 to 64 tokens, not {x_BxD.shape[0]}"
  sizes = [("F", gate_FxR.shape[0], TILE), ("R", gate_FxR.shape[1], CHUNK),
           ("D", x_BxD.shape[1], COLUMNS)]
  widths = [down_FxD.shape[1]]
  if up_FxU is not None:
    sizes.append(("U", up_FxU.shape[1], COLUMNS))
    widths.insert(0, up_FxU.shape[1])
  for name, size, unit in sizes:
    if size % unit:
      return f"needs {name} to be a multiple of {unit}, not {size}"
  if not (_rows_bytes(widths) and _rows_bytes_of_one(widths)):
    return f"rows of {down_FxD.shape[1]} numbers do not fit in shared memory"
  functions = [up_activation]
  if isinstance(select, (Elementwise, StatisticalTopk)):
    functions.append(select.activation)
  return gpu_functions.unsupported(*functions)


def _rows_bytes(widths: list[int]) -> int | None:
  """Bytes for rows of such widths of a warpgroup; None where none suffice."""
  alone = (_SHARED_BYTES - 4 * widths[-1]) // 2  # Beside a sum in float32.
  return next((size for size in (_ROWS_BYTES, alone)
               if gpu_rows.batch(widths, 2, size)), None)


def _rows_bytes_of_one(widths: list[int]) -> int | None:
  """The same in the one kernel."""
  alone = _SHARED_BYTES - gpu_scores.BYTES
  return next((size for size in (_ROWS_BYTES_OF_ONE, alone)
               if gpu_rows.batch(widths, 1, size)), None)


def _kernel(body, out_type, blocks: int, tokens: int, warpgroups: int,
            **scratch):
  # Sums over all of a warpgroup are for those that are alone in their block.
  parts = dict(num_threads=warpgroups, thread_name="part")
  return plgpu.kernel(
      body, out_type=out_type, grid=(blocks, tokens),
      grid_names=("block", "token"), scratch_types=scratch,
      compiler_params=mosaic_gpu.PARAMS, **parts if warpgroups > 1 else {})


def _rows(up_FxU: jax.Array | None, down_FxD: jax.Array
          ) -> dict[str, jax.Array]:
  """`up`, if there is one, and `down`, in pieces of what one copy may have."""
  rows = dict(up=up_FxU, down=down_FxD)
  return {name: x.reshape(x.shape[0], -1, COLUMNS)
          for name, x in rows.items() if x is not None}


def _activate(select, scores: list[jax.Array]) -> list[jax.Array]:
  return [inlined(select.activation, LANES)(score) for score in scores]


def _scores(tokens: int, neurons: int) -> list[jax.ShapeDtypeStruct]:
  """What the first kernel leaves, in float32.

  Scores (B, F); tiles' means and squared deviations (2, B, t), which beyond the
  tiles, up to a multiple of 32, are not written.
  """
  tiles = 32 * pl.cdiv(neurons // TILE, 32)
  return [jax.ShapeDtypeStruct(shape, jnp.float32)
          for shape in ((tokens, neurons), (2, tokens, tiles))]


@jax.jit
def _predict(x_BxD, gate_FxR):
  """The first kernel: see `_scores`."""
  neurons, width = gate_FxR.shape
  return _kernel(gpu_scores.write_scores, _scores(x_BxD.shape[0], neurons),
                 neurons // TILE, 1, 1,
                 **gpu_scores.scratch(width))(x_BxD, gate_FxR)


@functools.partial(jax.jit, static_argnums=4)
def _add_norm_and_predict(x_1xD, y_1xD, y_scale_D, scale_D, epsilon, gate_FxR):
  """As `_predict`, of norm(x + norm(y)); also that sum and its norm, (1, D)."""
  neurons, width = gate_FxR.shape

  def add_and_write_scores(*refs, token_smem, **smem):
    *tokens, gate_gmem, score_gmem, statistics_gmem, sum_gmem, norm_gmem = refs
    gpu_scores.write_scores(
        functools.partial(gpu_scores.put_and_norm, tokens, epsilon, sum_gmem,
                          norm_gmem, token_smem),
        gate_gmem, score_gmem, statistics_gmem, **smem)

  like_x = jax.ShapeDtypeStruct((x_1xD.size,), x_1xD.dtype)
  score, statistics, *tokens = _kernel(
      add_and_write_scores, [*_scores(1, neurons), like_x, like_x],
      neurons // TILE, 1, 1,
      token_smem=plgpu.SMEM((2, *like_x.shape), like_x.dtype),
      **gpu_scores.scratch(width, added=True))(
          *(a.reshape(-1) for a in (x_1xD, y_1xD, y_scale_D, scale_D)),
          gate_FxR)
  return score, statistics, *(a[None] for a in tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _accumulate(select, up_activation, score, statistics, x_BxD, up_FxU,
                down_FxD):
  """Partial sums (blocks, B, D / 256, 256), counts (blocks, 2, B)."""
  tokens, neurons = score.shape
  rows = _rows(up_FxU, down_FxD)
  shapes = {name: x.shape[1:] for name, x in rows.items()}
  # With many tokens fewer blocks a token, so that less is left to add up.
  groups = max(k for k in (1, 2, 4, 8)
               if k <= tokens and neurons % (2 * k * GROUP) == 0)
  blocks = neurons // (2 * groups * GROUP)

  def add_active(score_gmem, statistics_gmem, x_gmem, *refs, y_smem,
                 y_barrier, **smem):
    *rows_gmem, y_gmem, count_gmem = refs
    gmem = dict(zip(rows, rows_gmem))
    block, token, part = map(lax.axis_index, ("block", "token", "part"))
    first = (2 * block + part) * groups * GROUP
    scores = [mosaic_gpu.load(
        score_gmem.at[token, pl.ds(first + i * GROUP, GROUP)], LANES,
        optimized=False) for i in range(groups)]
    x = up_FxU if up_FxU is None else gpu_rows.load_x(
        x_gmem, token, up_FxU.shape[1])
    if isinstance(select, StatisticalTopk):
      theta = gpu_scores.threshold(token, select, statistics_gmem,
                                   neurons // TILE)
      scores = [jnp.maximum(score - theta, 0.0) for score in scores]
    y, count_gmem[block, part, token] = gpu_rows.add_rows(
        part, first, _activate(select, scores), x, up_activation,
        gmem.get("up"), gmem["down"], smem)

    @pl.when(part == 1)
    def _():
      y_smem[...] = y
      plgpu.commit_smem()
      plgpu.barrier_arrive(y_barrier)

    @pl.when(part == 0)
    def _():
      plgpu.barrier_wait(y_barrier)
      y_gmem[block, token] = y + mosaic_gpu.load(
          y_smem, gpu_rows.y_layout(shapes["down"]))

  out = (jax.ShapeDtypeStruct((blocks, tokens, *shapes["down"]), jnp.float32),
         jax.ShapeDtypeStruct((blocks, 2, tokens), jnp.int32))
  scratch = gpu_rows.scratch(2, groups * GROUP, 2,
                             _rows_bytes(gpu_rows.widths(shapes)), shapes)
  return _kernel(
      add_active, out, blocks, tokens, 2, y_barrier=plgpu.Barrier(),
      y_smem=plgpu.SMEM(shapes["down"], jnp.float32), **scratch)(
          score, statistics, x_BxD.reshape(tokens, -1, COLUMNS),
          *rows.values())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict_and_accumulate(select, up_activation, x_1xD, gate_FxR, up_FxU,
                            down_FxD):
  """As `_accumulate`, of one token whose neurons decide by themselves."""
  rows = _rows(up_FxU, down_FxD)
  shapes = {name: x.shape[1:] for name, x in rows.items()}
  tiles = gate_FxR.shape[0] // TILE

  def body(x_gmem, x_columns_gmem, gate_gmem, *refs, gate, **smem):
    *rows_gmem, y_gmem, count_gmem = refs
    gmem = dict(zip(rows, rows_gmem))
    tile = lax.axis_index("block")
    gpu_scores.multiply_gate(tile, x_gmem, gate_gmem, **gate)
    x = up_FxU if up_FxU is None else gpu_rows.load_x(
        x_columns_gmem, 0, up_FxU.shape[1])
    scores = [mosaic_gpu.load(
        gate["score_smem"].at[pl.ds(i, GROUP), 0], LANES, optimized=False)
              for i in range(0, TILE, GROUP)]
    y_gmem[tile, 0], count_gmem[tile, 0, 0] = gpu_rows.add_rows(
        0, tile * TILE, _activate(select, scores), x, up_activation,
        gmem.get("up"), gmem["down"], smem)

  out = (jax.ShapeDtypeStruct((tiles, 1, *shapes["down"]), jnp.float32),
         jax.ShapeDtypeStruct((tiles, 1, 1), jnp.int32))
  scratch = gpu_rows.scratch(
      1, TILE, 1, _rows_bytes_of_one(gpu_rows.widths(shapes)), shapes)
  return _kernel(
      body, out, tiles, 1, 1, gate=gpu_scores.scratch(gate_FxR.shape[1]),
      **scratch)(
          x_1xD, x_1xD.reshape(1, -1, COLUMNS), gate_FxR, *rows.values())


def _add_active(select, up_activation, score, statistics, x_BxD, up_FxU,
                down_FxD) -> tuple[jax.Array, jax.Array]:
  """What follows scores and statistics, whatever the selection."""
  if not isinstance(select, (Elementwise, StatisticalTopk)):
    # Of the whole row: XLA's work.
    score, select = select(score), Elementwise(linear)
  return _add_up(x_BxD, *_accumulate(select, up_activation, score, statistics,
                                     x_BxD, up_FxU, down_FxD))


def _add_up(x_BxD, y, count) -> tuple[jax.Array, jax.Array]:
  y = gpu_sums.add_up(y.reshape(y.shape[0], -1), x_BxD.dtype)
  return y.reshape(x_BxD.shape), count.sum((0, 1))


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`; what it serves, `unsupported` says."""
  if x_BxD.shape[0] > _ROW_BY_ROW_UP_TO:
    return gpu_all.sparse_ffn(x_BxD, gate_FxR, up_FxU, down_FxD, select,
                              up_activation)
  if isinstance(select, Elementwise) and x_BxD.shape[0] == 1:
    return _add_up(x_BxD, *_predict_and_accumulate(
        select, up_activation, x_BxD, gate_FxR, up_FxU, down_FxD))
  return _add_active(select, up_activation, *_predict(x_BxD, gate_FxR), x_BxD,
                     up_FxU, down_FxD)


def takes_in_add_norm(x_BxD: jax.Array, gate_FxR: jax.Array, select: Select
                      ) -> bool:
  """Whether `add_norm_and_sparse_ffn` serves, where `sparse_ffn` does."""
  tokens, width = x_BxD.shape
  # All of what the gate multiplies, and the sum and its norm.
  token_bytes = 2 * (gpu_scores.TOKENS * gate_FxR.shape[1] + 2 * width)
  return (tokens == 1 and not isinstance(select, Elementwise)
          and not add_norm.unsupported(x_BxD)
          and gpu_scores.BYTES + token_bytes <= _SHARED_BYTES)


def add_norm_and_sparse_ffn(
    x_1xD: jax.Array, y_1xD: jax.Array, y_scale_D: jax.Array,
    scale_D: jax.Array, epsilon: float, gate_FxR: jax.Array,
    up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
    up_activation: Activation) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As `api.add_norm_and_sparse_ffn`, of one token."""
  *scores, sum_1xD, norm_1xD = _add_norm_and_predict(
      x_1xD, y_1xD, y_scale_D, scale_D, epsilon, gate_FxR)
  return sum_1xD, *_add_active(select, up_activation, *scores, norm_1xD,
                               up_FxU, down_FxD)
