"""The operation on a TPU: rows of active neurons are fetched one by one.

XLA computes the scores and lists the neurons that are active for any token. A
Pallas kernel fetches their rows of `up` and `down` in groups, the next groups'
on their way while one is multiplied. Where so many are active that reading
everything is faster, the list is of all neurons, and a group is fetched in one
piece. XLA never sees a use of the matrices: it would fetch all of them ahead.

In memory a TPU keeps rows of a matrix interleaved, two in a word in bfloat16.
`layout` stores each row in one piece; do it once, when weights are loaded.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sparse_lm.kernels.sparse_ffn.reference import product
from sparse_lm.kernels.sparse_ffn.select import Activation, Select

# Rows are fetched while fewer than this fraction of the neurons is active for
# some token. An estimate for Gemma-2 2B's widths in bfloat16, of instructions
# and bytes: a row costs 15 cycles alone, and in one piece the time that its
# bytes take, 13 cycles of a v5e and 8 of a v6e. No TPU has confirmed it.
STREAM_BELOW = 0.5
_LANES = 128  # of a register, and neurons in a group
_UNROLL = 8  # copies started in one turn of the loop: their addresses overlap
_SLOTS = 3  # groups in fast memory: one multiplied, two on their way
_VMEM = 48 * 2**20  # bytes; v5e and v6e have 128 MiB, v7 64


def _words(dtype: jax.typing.DTypeLike) -> int:
  """Numbers in the 32 bits that a copy cannot divide."""
  return 4 // jnp.dtype(dtype).itemsize


def layout(rows_FxD: jax.Array) -> jax.Array:
  """Rows as the kernel fetches them, (F, P, D / P): P in 32 bits."""
  words = _words(rows_FxD.dtype)
  return rows_FxD.reshape(rows_FxD.shape[0], words, -1)


def _width(rows_FxPxC: jax.Array) -> int:
  return math.prod(rows_FxPxC.shape[1:])


def _vmem_bytes(batch: int, neurons: int, widths: list[int], size: int) -> int:
  """What the kernel holds in fast memory."""
  tokens, width = -(-batch // 8) * 8, sum(widths)
  return (_SLOTS * _LANES * width * size  # rows
          + 4 * tokens * (neurons + 2 * width))  # activations, x, y


def unsupported(x_BxD: jax.Array, gate_FxR: jax.Array,
                up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
                up_activation: Activation) -> str | None:
  """As `api.unsupported`; of the matrices or of their `layout`s."""
  del gate_FxR, select, up_activation  # XLA's, and whatever Pallas takes.
  batch = x_BxD.shape[0]
  if down_FxD.shape[0] < _LANES:
    return f"down_FxD has {down_FxD.shape[0]} rows, fewer than {_LANES}"
  widths = []
  for name, rows in (("up_FxU", up_FxU), ("down_FxD", down_FxD)):
    if rows is None:
      continue
    if rows.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name} is {rows.dtype}, not bfloat16 or float32"
    multiple = _words(rows.dtype) * _LANES
    if _width(rows) % multiple:
      return (f"{name} has rows of {_width(rows)} numbers, not a multiple of "
              f"{multiple} ({rows.dtype})")
    if rows.dtype != down_FxD.dtype:
      return f"up_FxU is {rows.dtype}, down_FxD {down_FxD.dtype}"
    widths.append(_width(rows))
  needed = _vmem_bytes(batch, down_FxD.shape[0], widths,
                       down_FxD.dtype.itemsize)
  if needed > _VMEM:
    return (f"{batch} tokens, {down_FxD.shape[0]} neurons and rows of "
            f"{' and '.join(map(str, widths))} numbers need {needed} bytes of "
            f"fast memory, more than {_VMEM}")
  return None


def _kernel(rows_F, count_1, rows_1xF, activation_BxF, *refs, up_activation):
  """One call computes everything.

  Two rows of a bfloat16 matrix make the words of one row of a (G P, C) matrix
  here: so a neuron's row of U numbers is P rows of C, and nothing is unpacked.
  J are a group's neurons, each P times.

  Args:
    rows_F: the neurons whose rows are read, in order; for scalars.
    count_1: how many of them there are.
    rows_1xF: the same neurons, for vectors.
    activation_BxF: of all neurons.
    *refs: x_BxU unless the layer is plain; the matrices in slow memory, up
      (unless plain) and down; the output y_BxD; a buffer for each matrix,
      (slot, row of the group, P, C); the slots' semaphores.
    up_activation: of the other branch.
  """
  x_BxU = refs[0] if len(refs) == 7 else None
  matrices, refs = ((refs[1:3], refs[3:]) if x_BxU is not None
                    else (refs[:1], refs[1:]))
  y_BxD, *buffers, arrived = refs
  count = count_1[0]
  words = buffers[0].shape[2]
  lanes = words * _LANES

  def parts(x_BxU):
    """The parts of each token that words keep together, (P B, C)."""
    return jnp.concatenate(jnp.split(x_BxU, words, axis=1))

  def rows_in(group):
    return jnp.clip(count - group * _LANES, 0, _LANES)

  def copies(group, first, size, source):
    """Of `size` rows of each matrix, to rows `first`... of a group's slot."""
    slot = jax.lax.rem(group, _SLOTS)
    return [pltpu.make_async_copy(
        matrix.at[pl.ds(source, size)],
        buffer.at[slot, pl.ds(first, size)], arrived.at[slot])
            for matrix, buffer in zip(matrices, buffers, strict=True)]

  def start(group):
    first = group * _LANES

    @pl.when(first < count)
    def _():
      together = (rows_in(group) == _LANES) & (
          rows_F[first + _LANES - 1] - rows_F[first] == _LANES - 1)

      @pl.when(together)
      def _():
        for copy in copies(group, 0, _LANES, rows_F[first]):
          copy.start()

      @pl.when(jnp.logical_not(together))
      def _():
        turns = jax.lax.div(rows_in(group), _UNROLL)

        def fetch(j):
          for copy in copies(group, j, 1, rows_F[first + j]):
            copy.start()

        @pl.loop(0, turns)
        def _(turn):
          for j in range(_UNROLL):
            fetch(turn * _UNROLL + j)

        pl.loop(turns * _UNROLL, rows_in(group))(fetch)

  def wait(group):
    # Only sizes count here, not which row it was.
    full = rows_in(group) == _LANES

    @pl.when(full)
    def _():
      for copy in copies(group, 0, _LANES, 0):
        copy.wait()

    @pl.when(jnp.logical_not(full))
    def _():
      @pl.loop(0, rows_in(group))
      def _(j):
        for copy in copies(group, j, 1, 0):
          copy.wait()

  def take(array_BxG, lane_BxG):
    return jnp.take_along_axis(array_BxG, lane_BxG, axis=1,
                               mode="promise_in_bounds")

  def pick(group):
    """The activations of a group's neurons (B, J), 0 beyond the last one."""
    first = pl.multiple_of(group * _LANES, _LANES)
    row_BxG = jnp.broadcast_to(rows_1xF[:, pl.ds(first, _LANES)],
                               (activation_BxF.shape[0], _LANES))

    def add(tile, picked_BxG):
      start = pl.multiple_of(tile * _LANES, _LANES)
      lane_BxG = row_BxG - start
      here_BxG = (lane_BxG >= 0) & (lane_BxG < _LANES)
      found_BxG = take(activation_BxF[:, pl.ds(start, _LANES)],
                       jnp.where(here_BxG, lane_BxG, 0))
      return jnp.where(here_BxG, found_BxG, picked_BxG)

    last = first + rows_in(group) - 1
    picked_BxG = jax.lax.fori_loop(
        jax.lax.div(rows_F[first], _LANES),
        jax.lax.div(rows_F[last], _LANES) + 1, add,
        jnp.zeros(row_BxG.shape, jnp.float32))
    lane_BxG = jax.lax.broadcasted_iota(jnp.int32, row_BxG.shape, 1)
    return jnp.concatenate([
        take(picked_BxG, jax.lax.div(p * _LANES + lane_BxG, words))
        for p in range(words)], axis=1)

  def multiply(group):
    slot = jax.lax.rem(group, _SLOTS)
    there = rows_in(group)
    hidden_BxJ = pick(group)
    tokens = hidden_BxJ.shape[0]
    lane_BxJ = jax.lax.broadcasted_iota(jnp.int32, hidden_BxJ.shape, 1)
    word_BxJ = jax.lax.rem(lane_BxJ, words)
    down_GxPxC = buffers[-1].at[slot]

    # What no copy has filled may hold anything, NaN too.
    @pl.when(there < _LANES)
    def _():
      row_GxPxC = jax.lax.broadcasted_iota(jnp.int32, down_GxPxC.shape, 0)
      down_GxPxC[...] = jnp.where(row_GxPxC < there, down_GxPxC[...], 0)

    def rows_of(buffer):
      return buffer[slot].reshape(lanes, buffer.shape[-1])

    if x_BxU is not None:
      # Every part of x times every part of a row; J then has, of each, the
      # part of the row times that of x. A neuron's sum is over its lanes.
      product_PBxJ = product(parts(x_BxU[...]), rows_of(buffers[0]))
      branch_BxJ = product_PBxJ[:tokens]
      for p in range(1, words):
        branch_BxJ = jnp.where(
            word_BxJ == p, product_PBxJ[p * tokens:(p + 1) * tokens],
            branch_BxJ)
      if words == 2:
        branch_BxJ += jnp.where(word_BxJ == 0,
                                pltpu.roll(branch_BxJ, lanes - 1, 1),
                                pltpu.roll(branch_BxJ, 1, 1))
      hidden_BxJ = jnp.where(lane_BxJ < there * words,
                             hidden_BxJ * up_activation(branch_BxJ), 0)
    hidden_PBxJ = jnp.concatenate(
        [jnp.where(word_BxJ == p, hidden_BxJ, 0) for p in range(words)])
    y_PBxC = jnp.dot(hidden_PBxJ.astype(down_GxPxC.dtype), rows_of(buffers[-1]),
                     preferred_element_type=jnp.float32)
    width = y_PBxC.shape[1]
    for p in range(words):
      y_BxD[:, p * width:(p + 1) * width] += (
          y_PBxC[p * tokens:(p + 1) * tokens])

  y_BxD[...] = jnp.zeros(y_BxD.shape, jnp.float32)

  @pl.loop(0, _SLOTS - 1)
  def _(group):
    start(group)

  @pl.loop(0, jax.lax.div(count + _LANES - 1, _LANES))
  def _(group):
    start(group + _SLOTS - 1)
    wait(group)
    multiply(group)


def _pad(array: jax.Array, axis: int, multiple: int, value=0) -> jax.Array:
  pads = [(0, 0)] * array.ndim
  pads[axis] = (0, -array.shape[axis] % multiple)
  return jnp.pad(array, pads, constant_values=value)


def _multiply(rows_F, count, activation_BxF, x_BxU, up_FxPxC, down_FxPxC,
              up_activation):
  """The output (B, D) in float32, `count` rows read."""
  batch, neurons = activation_BxF.shape
  rows_F = _pad(rows_F, 0, _LANES, neurons)
  activation_BxF = _pad(_pad(activation_BxF, 0, 8), 1, _LANES)
  inputs, matrices = [activation_BxF], [down_FxPxC]
  if up_FxPxC is not None:
    inputs.append(_pad(x_BxU, 0, 8))
    matrices.insert(0, up_FxPxC)
  # Else XLA may fetch all of a matrix ahead, where it finds the time.
  matrices = [pltpu.with_memory_space_constraint(m, pltpu.HBM)
              for m in matrices]
  vmem, hbm = (pl.BlockSpec(memory_space=m) for m in (pltpu.VMEM, pl.ANY))
  needed = _vmem_bytes(batch, neurons, [_width(m) for m in matrices],
                       down_FxPxC.dtype.itemsize)
  y_BxD = pl.pallas_call(
      functools.partial(_kernel, up_activation=up_activation),
      out_shape=jax.ShapeDtypeStruct(
          (activation_BxF.shape[0], _width(down_FxPxC)), jnp.float32),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(),
          in_specs=[vmem] * (1 + len(inputs)) + [hbm] * len(matrices),
          out_specs=vmem,
          scratch_shapes=[
              pltpu.VMEM((_SLOTS, _LANES, *m.shape[1:]), m.dtype)
              for m in matrices] + [pltpu.SemaphoreType.DMA((_SLOTS,))]),
      compiler_params=pltpu.CompilerParams(
          # And room for what the compiler keeps there itself.
          vmem_limit_bytes=needed + 8 * 2**20,
          # Half of the time that it takes to start a copy.
          disable_bounds_checks=True),
      name="sparse_ffn",
  )(rows_F, count[None], rows_F[None], *inputs, *matrices)
  return y_BxD[:batch]


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`; `up` and `down` should be `layout`s.

  Otherwise each call lays them out, which reads all of them.
  """
  up_FxPxC, down_FxPxC = (
      a if a is None or a.ndim == 3 else layout(a) for a in (up_FxU, down_FxD))
  activation_BxF = select(product(x_BxD[:, :gate_FxR.shape[1]], gate_FxR))
  active_F = (activation_BxF != 0).any(0)
  neurons = active_F.size
  read_F = active_F | (active_F.sum() >= STREAM_BELOW * neurons)
  # Those that are not read come last, as a number that no neuron has.
  rows_F = jnp.sort(jnp.where(read_F, jnp.arange(neurons), neurons),
                    stable=False)
  x_BxU = None
  if up_FxPxC is not None:
    x_BxU = x_BxD[:, x_BxD.shape[1] - _width(up_FxPxC):]
  y_BxD = _multiply(rows_F, read_F.sum(dtype=jnp.int32), activation_BxF, x_BxU,
                    up_FxPxC, down_FxPxC, up_activation)
  return (y_BxD.astype(x_BxD.dtype),
          jnp.count_nonzero(activation_BxF, axis=-1))
