"""Inside the GPU kernels: the rows of active neurons, read and added."""

import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.gpu_functions import inlined
from sparse_lm.kernels.mosaic_gpu import LANES
from sparse_lm.kernels.sparse_ffn.select import Activation

# Neurons that are listed together: a lane a neuron, a bit a neuron.
GROUP = 32


def batch(columns: list[int], places: int, budget: int) -> int:
  """How many neurons' rows one batch of copies brings.

  A warp multiplies a row of `up`, so at most four are of use.

  Args:
    columns: of `up`, if there is one, and of `down`.
    places: batches in shared memory at a time.
    budget: bytes of shared memory for them.
  """
  *up, down = columns
  left = budget // (2 * places) - 4 * sum(up)
  return min(4, max(0, left // down))


def widths(row_shapes: dict[str, tuple[int, int]]) -> list[int]:
  """Of `up`, if there is one, and of `down`, from shapes in columns of 256."""
  return [math.prod(row_shapes[name]) for name in ("up", "down")
          if name in row_shapes]


def scratch(parts: int, neurons: int, places: int, budget: int,
            row_shapes: dict[str, tuple[int, int]]) -> dict:
  """Shared memory of `add_rows`.

  Args:
    parts: warpgroups, each with neurons of its own.
    neurons: of each.
    places: batches of rows in shared memory at a time.
    budget: bytes for the rows of one part.
    row_shapes: of "down" and, if there is one, of "up", in columns of 256.
  """
  rows = batch(widths(row_shapes), places, budget)
  smem = dict(activation=plgpu.SMEM((parts, neurons), jnp.float32),
              active=plgpu.SMEM((parts, neurons), jnp.int32),
              hidden=plgpu.SMEM((parts, places, 4), jnp.float32))
  for name, shape in row_shapes.items():
    smem[name] = plgpu.SMEM(
        (parts, places, 4 if name == "up" else rows, *shape), jnp.bfloat16)
    smem[f"{name}_barriers"] = plgpu.Barrier(num_arrivals=rows,
                                             num_barriers=parts * places)
  return smem


def load_x(x_gmem, token, columns: int) -> jax.Array:
  """The last columns of a token, (columns / 256, 256) in float32."""
  pieces = columns // mosaic_gpu.COLUMNS
  first = x_gmem.shape[1] - pieces
  return mosaic_gpu.load_row(x_gmem.at[token, pl.ds(first, pieces)])


def _list_active(activations: list[jax.Array], activation_smem, active_smem
                 ) -> jax.Array:
  """Writes activations and the list of neurons that have one; its length."""
  lane = plgpu.broadcasted_iota(jnp.int32, (GROUP,), 0, layout=LANES)
  masks = []
  for i, activation in enumerate(activations):
    activation_smem[pl.ds(i * GROUP, GROUP)] = activation
    active = (activation != 0.0).astype(jnp.int32)
    # A bit a neuron: bits are quicker to walk than what lanes hold.
    masks.append(((active << lane).sum(), active.sum()))
  count = jnp.int32(0)
  for i, (bits, active) in enumerate(masks):

    def list_next(n, bits, group=i, listed=count):
      highest = 31 - lax.clz(bits)
      active_smem[listed + n] = group * GROUP + highest
      return bits ^ (jnp.int32(1) << highest)

    lax.fori_loop(0, active, list_next, bits)
    count += active
  plgpu.commit_smem()
  return count


def add_rows(part, first_neuron, activations: list[jax.Array], x,
             up_activation: Activation, up_gmem, down_gmem, smem: dict
             ) -> tuple[jax.Array, jax.Array]:
  """A warpgroup's sum over its active neurons, and how many they are.

  However many are active, all are computed: they come in batches, the next
  ones on their way while one is used.

  Args:
    part: which warpgroup of the block, traced.
    first_neuron: of its neurons.
    activations: of its neurons, 32 an array.
    x: what `up` multiplies, from `load_x`; None in a plain layer.
    up_activation: of the other branch.
    up_gmem: (F, U / 256, 256); None in a plain layer.
    down_gmem: (F, D / 256, 256).
    smem: as `scratch` has it.

  Returns:
    (D / 256, 256) in float32, and a scalar.
  """
  activation_smem, active_smem, hidden_smem, down_smem = (
      smem[name].at[part] for name in ("activation", "active", "hidden",
                                       "down"))
  places, rows = down_smem.shape[:2]
  branches = [(down_gmem, down_smem, smem["down_barriers"])]
  if up_gmem is not None:
    branches.insert(0, (up_gmem, smem["up"].at[part], smem["up_barriers"]))
  shape = down_gmem.shape[1:]
  count = _list_active(activations, activation_smem, active_smem)
  batches = pl.cdiv(count, rows)

  def ask(n):
    """Starts the copies of a batch's rows, each warp those of a neuron."""
    place = n % places
    barrier = part * places + place

    @plgpu.warp_map
    def _(warp):
      listed = n * rows + warp

      @pl.when((warp < rows) & (listed < count))
      def _():
        i = active_smem[listed]
        hidden_smem[place, warp] = activation_smem[i]
        for gmem, row_smem, barriers in branches:
          plgpu.copy_gmem_to_smem(gmem.at[first_neuron + i],
                                  row_smem.at[place, warp],
                                  barriers.at[barrier])

      @pl.when((warp < rows) & (listed >= count))
      def _():  # The barriers count whole batches.
        for *_, barriers in branches:
          plgpu.barrier_arrive(barriers.at[barrier])

  def multiply_up(place):
    """Multiplies a batch's activations with their `up` products.

    What no copy has filled may hold anything; nothing reads what it makes.
    """
    plgpu.barrier_wait(smem["up_barriers"].at[part * places + place])
    product = mosaic_gpu.row_products(smem["up"].at[part, place], x)
    layout = mosaic_gpu.ROW_A_WARP.reduce((1, 2))
    hidden = mosaic_gpu.load(hidden_smem.at[place], layout)
    hidden_smem[place] = hidden * inlined(up_activation, layout)(product)
    plgpu.commit_smem()

  def one_batch(n, y):
    place = n % places
    if up_gmem is not None:
      multiply_up(place)
    plgpu.barrier_wait(smem["down_barriers"].at[part * places + place])

    def add(i, y):
      row = mosaic_gpu.load(down_smem.at[place, i], y_layout(shape))
      return y + hidden_smem[place, i] * row.astype(jnp.float32)

    y = lax.fori_loop(0, jnp.minimum(count - n * rows, rows), add, y)
    plgpu.commit_smem()  # The rows have been read.
    pl.when(n + places < batches)(lambda: ask(n + places))
    return y

  for n in range(places):
    pl.when(n < batches)(lambda n=n: ask(n))
  y = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), y_layout(shape))
  return lax.fori_loop(0, batches, one_batch, y), count


def y_layout(shape: tuple[int, int]):
  """How a warpgroup's threads share an output row."""
  return plgpu.Layout.WG_STRIDED(shape, 2)
