"""`gated_topk` in Pallas Mosaic GPU, for NVIDIA Hopper.

Memory's speed is the limit, so each array passes once: a thread block takes a
row, has the copy engine bring all of it to shared memory, reads it there as
often as the sums need, writes its results over what it has read, and has them
copied back. The blocks that share a multiprocessor hide each other's waits.

A row is (F / 128, 128). A warpgroup takes every n-th piece of 4 such lines, a
warp a line, and adds up by thread; a thread's numbers meet the others' once a
sum: its warp's by shuffles, the warps' in shared memory.
"""

import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import gpu_functions, mosaic_gpu
from sparse_lm.kernels.gpu_functions import inlined, with_slope
from sparse_lm.kernels.statistical_topk.rule import Activation, Rule

# A line, and the lines of a piece: one of each warp of a warpgroup.
_LINE, _WARPS = 128, 4
# Warpgroups of a block. Shared memory holds 4 forward rows of 13,824 neurons
# at 2 bytes, or 2 backward ones.
_FORWARD_THREADS, _BACKWARD_THREADS = 2, 3
# A copy's dimensions are at most 256, and two backward rows share 227 KB.
_MAX_NEURONS = 18_432
# 4 numbers a thread.
_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((_WARPS, _LINE), (4,))), warp_dims=(-3,), lane_dims=(-2,),
    vector_dim=-1)
# tanh and exp to 11 bits, where results have 8. No sum here needs the scratch,
# and with it one row less would fit.
_PARAMS = dataclasses.replace(mosaic_gpu.PARAMS, approx_math=True,
                              reduction_scratch_bytes=0)


def unsupported(score_NxF: jax.Array, up_NxF: jax.Array | None,
                activation: Activation, up_activation: Activation
                ) -> str | None:
  """As `api.unsupported`."""
  neurons, piece = score_NxF.shape[1], _WARPS * _LINE
  if score_NxF.dtype != jnp.bfloat16:
    return f"needs bfloat16, not {score_NxF.dtype}"
  if up_NxF is not None and up_NxF.dtype != score_NxF.dtype:
    return f"needs score and up of one type, not {up_NxF.dtype}"
  if neurons % piece or neurons > _MAX_NEURONS:
    return (f"needs F to be a multiple of {piece} up to {_MAX_NEURONS}, "
            f"not {neurons}")
  return gpu_functions.unsupported(with_slope(activation),
                                   with_slope(up_activation))


class _Block:
  """What the warpgroups of a block do together.

  Attributes:
    row: the block's.
    thread: this warpgroup.
    pieces: how many a row has.
  """

  def __init__(self, lines: int, threads: int):
    self.row = lax.axis_index("row")
    self.thread = lax.axis_index("thread")
    self.pieces, self._threads = lines // _WARPS, threads

  def fetch(self, gmems, smems, barriers) -> None:
    """Starts the copies of this row."""
    @pl.when(self.thread == 0)
    def _():
      for i, (gmem, smem) in enumerate(zip(gmems, smems)):
        plgpu.copy_gmem_to_smem(gmem.at[self.row], smem, barriers.at[i])

  def loop(self, body, start=None):
    """body(lines, carry) of each piece that is this warpgroup's."""
    count = pl.cdiv(self.pieces - self.thread, self._threads)

    def step(i, carry):
      piece = i * self._threads + self.thread
      return body(pl.ds(piece * _WARPS, _WARPS), carry)

    return lax.fori_loop(0, count, step, start)

  def add(self, f, sums, barrier) -> jax.Array:
    """The sum over the row of f(lines), a piece's numbers."""
    self.leave(self.loop(lambda lines, sums: sums + f(lines), self.zeros()),
               sums)
    self.meet(barrier)
    return self.total(sums)

  def zeros(self) -> jax.Array:
    """Where a thread's sum starts."""
    return plgpu.layout_cast(jnp.zeros((_WARPS, _LINE), jnp.float32), _LAYOUT)

  def leave(self, sum_by_thread, sums) -> None:
    """Writes this warpgroup's share of a sum where the others find it."""
    sums[pl.ds(self.thread * _WARPS, _WARPS)] = sum_by_thread.sum(1)

  def total(self, sums) -> jax.Array:
    """The sum of what all have left; they have met."""
    total = sums[0]
    for i in range(1, self._threads * _WARPS):
      total += sums[i]
    return total

  def meet(self, barrier) -> None:
    """Waits until every warpgroup is here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)

  def send(self, smem, gmem, barrier) -> None:
    """Starts the copy of what all warpgroups have written to this row."""
    plgpu.commit_smem()
    self.meet(barrier)

    @pl.when(self.thread == 0)
    def _():
      plgpu.copy_smem_to_gmem(smem, gmem.at[self.row])

  def finish(self) -> None:
    """Waits until the results have left shared memory."""
    @pl.when(self.thread == 0)
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load(smem, lines) -> jax.Array:
  return mosaic_gpu.load(smem.at[lines], _LAYOUT).astype(jnp.float32)


def _not_0(x: jax.Array) -> jax.Array:
  return jnp.where(x != 0.0, 1.0, 0.0)


def _forward_row(rule: Rule, gmems, h_gmem, mean_gmem, std_gmem, count_gmems,
                 *, smems, sums_smem, fetched, met) -> None:
  """A row of h.

  Args:
    rule: the formulas.
    gmems: score and up (N, F / 128, 128), or score alone.
    h_gmem: written, like these.
    mean_gmem: written, (N,).
    std_gmem: written, (N,).
    count_gmems: written, (N,): activations that are not 0, and results.
    smems: for this row of score and up.
    sums_smem: (4, warps): what the warps have added up, of four sums.
    fetched: when score is here, when up is.
    met: where the warpgroups wait for each other.
  """
  score_smem = smems[0]
  block = _Block(score_smem.shape[0], _FORWARD_THREADS)
  count = score_smem.shape[0] * _LINE
  gate, branch = (inlined(with_slope(f), _LAYOUT)
                  for f in (rule.activation, rule.up_activation))
  block.fetch(gmems, smems, fetched)
  plgpu.barrier_wait(fetched.at[0])
  mean = block.add(lambda lines: _load(score_smem, lines), sums_smem.at[0],
                   met.at[0]) / count

  def square(lines):
    off = _load(score_smem, lines) - mean
    return off * off

  std = rule.deviation(block.add(square, sums_smem.at[1], met.at[1]), count)
  theta = rule.theta(mean, std)

  @pl.when(block.thread == 0)
  def _():
    mean_gmem[block.row] = mean
    std_gmem[block.row] = std

  if len(smems) > 1:
    plgpu.barrier_wait(fetched.at[1])

  def write(lines, counts):
    active, nonzero = counts
    h = gate(jnp.maximum(_load(score_smem, lines) - theta, 0.0))[0]
    active += _not_0(h)
    if len(smems) > 1:
      h *= branch(_load(smems[1], lines))[0]
    smems[-1][lines] = h.astype(score_smem.dtype)
    return active, nonzero + _not_0(h)

  for i, counts in enumerate(block.loop(write, (block.zeros(),) * 2)):
    block.leave(counts, sums_smem.at[2 + i])
  block.send(smems[-1], h_gmem, met.at[2])

  @pl.when(block.thread == 0)
  def _():
    for i, count_gmem in enumerate(count_gmems):
      count_gmem[block.row] = block.total(sums_smem.at[2 + i])

  block.finish()


def _backward_row(rule: Rule, gmems, mean_gmem, std_gmem, d_gmems, *, smems,
                  sums_smem, fetched, met) -> None:
  """A row of the gradients.

  Args:
    rule: the formulas.
    gmems: h's gradient, score and up (N, F / 128, 128), or without up.
    mean_gmem: of score's rows (N,).
    std_gmem: of score's rows (N,).
    d_gmems: written: the gradients of score and up, or of score alone.
    smems: for this row of h's gradient, score and up.
    sums_smem: (4, warps): what the warps have added up, in the first row.
    fetched: when each of the row's arrays is here.
    met: where the warpgroups wait for each other.
  """
  d_h_smem, score_smem, *up_smem = smems
  block = _Block(score_smem.shape[0], _BACKWARD_THREADS)
  count = score_smem.shape[0] * _LINE
  gate, branch = (inlined(with_slope(f), _LAYOUT)
                  for f in (rule.activation, rule.up_activation))
  block.fetch(gmems, smems, fetched)
  mean, std = mean_gmem[block.row], std_gmem[block.row]
  theta = rule.theta(mean, std)
  for i in range(len(smems)):
    plgpu.barrier_wait(fetched.at[i])

  def passed(lines):
    """The score's gradient with theta fixed; replaces d_h. Up's replaces up."""
    d_h, over = _load(d_h_smem, lines), _load(score_smem, lines) - theta
    y, slope = gate(jnp.maximum(over, 0.0))
    p = jnp.where(over > 0.0, d_h * slope, 0.0)
    if up_smem:
      u, up_slope = branch(_load(up_smem[0], lines))
      up_smem[0][lines] = (d_h * y * up_slope).astype(score_smem.dtype)
      p *= u
    d_h_smem[lines] = p.astype(score_smem.dtype)
    return p

  total = block.add(passed, sums_smem.at[0], met.at[0])
  if up_smem:
    block.send(up_smem[0], d_gmems[1], met.at[1])
  fixed, slope = total / count, total * rule.slope(std, count)

  def write(lines, carry):
    off = _load(score_smem, lines) - mean
    d_score = _load(d_h_smem, lines) - (fixed + slope * off)
    d_h_smem[lines] = d_score.astype(score_smem.dtype)
    return carry

  block.loop(write)
  block.send(d_h_smem, d_gmems[0], met.at[2])
  block.finish()


def _kernel(body, threads: int, rows: tuple[jax.Array, ...], out_type):
  """A kernel of a block for each row.

  Args:
    body: of a row.
    threads: warpgroups of a block.
    rows: the arrays (N, F / 128, 128) that it fetches.
    out_type: of the results.
  """
  n, lines, _ = rows[0].shape
  scratch = dict(
      smems=[plgpu.SMEM((lines, _LINE), x.dtype) for x in rows],
      sums_smem=plgpu.SMEM((4, threads * _WARPS), jnp.float32),
      fetched=plgpu.Barrier(num_barriers=len(rows)),
      met=plgpu.Barrier(num_arrivals=threads, num_barriers=3))
  return plgpu.kernel(
      body, out_type=out_type, grid=(n,), grid_names=("row",),
      num_threads=threads, thread_name="thread", scratch_types=scratch,
      compiler_params=_PARAMS)


def _lines(x_NxF: jax.Array) -> jax.Array:
  return x_NxF.reshape(x_NxF.shape[0], -1, _LINE)


@functools.partial(jax.jit, static_argnums=0)
def forward(rule: Rule, score_NxF: jax.Array, up_NxF: jax.Array | None
            ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """As `xla.forward`; what it serves, `unsupported` says."""
  rows = tuple(_lines(x) for x in (score_NxF, up_NxF) if x is not None)
  row = jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)
  number = jax.ShapeDtypeStruct(rows[0].shape[:1], jnp.float32)

  def body(*refs, **scratch):
    h, mean, std, *counts = refs[len(rows):]
    _forward_row(rule, refs[:len(rows)], h, mean, std, counts, **scratch)

  h, *numbers = _kernel(body, _FORWARD_THREADS, rows,
                        (row, *[number] * 4))(*rows)
  return h.reshape(score_NxF.shape), *numbers


@functools.partial(jax.jit, static_argnums=0)
def backward(rule: Rule, score_NxF: jax.Array, up_NxF: jax.Array | None,
             mean_N: jax.Array, std_N: jax.Array, d_h_NxF: jax.Array
             ) -> tuple[jax.Array, jax.Array | None]:
  """As `xla.backward`."""
  rows = tuple(_lines(x) for x in (d_h_NxF, score_NxF, up_NxF)
               if x is not None)
  row = jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)

  def body(*refs, **scratch):
    gmems, rest = refs[:len(rows)], refs[len(rows):]
    _backward_row(rule, gmems, *rest[:2], rest[2:], **scratch)

  outs = _kernel(body, _BACKWARD_THREADS, rows, (row,) * (len(rows) - 1))(
      *rows, mean_N, std_N)
  d_score, *d_up = (x.reshape(score_NxF.shape) for x in outs)
  return d_score, d_up[0] if d_up else None
