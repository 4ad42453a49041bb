"""What Pallas Mosaic GPU lacks, and how its supported versions differ."""

from collections.abc import Callable
import math

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# Layouts are chosen here and not inferred, and barriers stand where they must.
PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True)

# Whether kernels can put arrays together.
CONCATENATES = jax.__version_info__ >= (0, 11)


# Of a vector, 32 numbers or a multiple, lane by lane; every warp has them all.
LANES = plgpu.Layout.TILED(
    plgpu.Tiling(((32,), (1,))), warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,), vector_dim=-1)
# A copy's longest dimension: a long row is (columns / 256, 256).
COLUMNS = 256
# Of four such rows, a row a warp, 8 columns a thread.
ROW_A_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 1, COLUMNS), (8,))), warp_dims=(-4,), lane_dims=(-2,),
    vector_dim=-1)


def load(ref, layout, *, optimized: bool = True) -> jax.Array:
  """`ref`'s array in a layout.

  Args:
    ref: in shared or global memory.
    layout: how threads share the array.
    optimized: False for any pattern of access, global memory's for one.
  """
  index = () if jax.__version_info__ >= (0, 11) else ((),)
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store(ref, value: jax.Array) -> None:
  """Writes an array to `ref` by any pattern of access."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def load_row(ref) -> jax.Array:
  """A row (columns / 256, 256) in float32, which every warp has."""
  return load(ref, ROW_A_WARP.reduce(0), optimized=False).astype(jnp.float32)


def row_products(rows_ref, row: jax.Array) -> jax.Array:
  """Products of four rows (4, columns / 256, 256) with one, (4,) in float32.

  Args:
    rows_ref: in shared memory.
    row: from `load_row`.
  """
  rows = load(rows_ref, ROW_A_WARP)
  row = plgpu.layout_cast(lax.broadcast_in_dim(row, rows.shape, (1, 2)),
                          ROW_A_WARP)
  return (rows.astype(jnp.float32) * row).sum(1).sum(1)


def cluster_sync(barrier, meanwhile: Callable[[], None] = lambda: None
                 ) -> None:
  """Waits for a cluster's blocks: what each wrote before, all see after.

  By the cluster's own barrier, 0.4 us on an H200 where `barrier` takes 0.6.
  Interpret mode does not know that one: tests put `interpreted_sync` here.

  Args:
    barrier: a `plgpu.ClusterBarrier` of all of the cluster's axes.
    meanwhile: called after this block's arrival: others need not wait for it.
  """
  del barrier
  _inline_ptx("barrier.cluster.arrive.release;")
  meanwhile()
  _inline_ptx("barrier.cluster.wait.acquire;")


def interpreted_sync(barrier, meanwhile: Callable[[], None] = lambda: None
                     ) -> None:
  """As `cluster_sync`, in interpret mode."""
  plgpu.commit_smem()  # All threads have come this far.
  plgpu.barrier_arrive(barrier)
  meanwhile()
  plgpu.barrier_wait(barrier)


def _inline_ptx(instruction: str) -> None:
  @plgpu.inline_mgpu()
  def inline(_):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], instruction, "",
                    has_side_effects=True)

  inline()


def inlined(function: Callable[[jax.Array], jax.Array]
            ) -> Callable[[jax.Array], jax.Array]:
  """An elementwise function without its rules of differentiation.

  Mosaic GPU does not know the calls that carry those: `jax.nn.relu` is one.
  """
  def evaluate(closed, values):
    env = dict(zip(closed.jaxpr.constvars, closed.consts))
    env |= dict(zip(closed.jaxpr.invars, values))

    def read(atom):
      return atom.val if hasattr(atom, "val") else env[atom]

    for eqn in closed.jaxpr.eqns:
      inputs = [read(atom) for atom in eqn.invars]
      inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
      if inner is not None:
        outputs = evaluate(inner, inputs)
      else:
        outputs = eqn.primitive.bind(*inputs, **eqn.params)
        if not eqn.primitive.multiple_results:
          outputs = [outputs]
      env.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in closed.jaxpr.outvars]

  def call(x: jax.Array) -> jax.Array:
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    return evaluate(closed, [x])[0]

  return call


def log2(x: jax.Array) -> jax.Array:
  """To base 2, of float32: one instruction where math is approximate."""
  if jax.__version_info__ >= (0, 11):
    return jax.lax.log2(x)
  return jax.lax.log(x) * math.log2(math.e)
