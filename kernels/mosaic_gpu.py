"""What Pallas Mosaic GPU lacks, and how its supported versions differ."""

from collections.abc import Callable
import math

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# Layouts are chosen here and not inferred, and barriers stand where they must.
PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True)

# Of a warpgroup's 128 numbers: a number a thread.
BY_THREAD = plgpu.Layout.TILED(
    plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,),
    vector_dim=-1)

# Of (rows, 128): a column a thread.
COLUMN_A_THREAD = plgpu.Layout.TILED(
    plgpu.Tiling(((1, 128), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,),
    vector_dim=-1)
# Of (rows, 32): a column a lane, the same in each warp.
COLUMN_A_LANE = plgpu.Layout.TILED(
    plgpu.Tiling(((1, 32), (1,))), warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,), vector_dim=-1)

# Multiprocessors of an H100 or H200.
PROCESSORS = 132
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


def cluster_sync(meanwhile: Callable[[], None] = lambda: None) -> None:
  """Waits for a cluster's blocks: what each wrote before, all see after.

  By the cluster's own barrier, 0.4 us on an H200; a `plgpu.ClusterBarrier`
  takes 0.6.

  Args:
    meanwhile: called after this block's arrival: others need not wait for it.
  """
  @plgpu.inline_mgpu()
  def cluster_arrive(_):
    _run_ptx("barrier.cluster.arrive.release;", "~{memory}")

  @plgpu.inline_mgpu()
  def cluster_wait(_):
    _run_ptx("barrier.cluster.wait.acquire;", "~{memory}")

  cluster_arrive()
  meanwhile()
  cluster_wait()


def send(number_T: jax.Array, block_T: jax.Array, place_T: jax.Array, ref
         ) -> None:
  """Writes into shared memory of the cluster's blocks, a number a thread.

  They see it after the next `cluster_sync`. All of them have started: Mosaic
  GPU lets none begin before. After a cluster's last `cluster_sync` nobody may
  send: others may have ended.

  Args:
    number_T: float32 (128,), in layout `BY_THREAD` or all the same, like
      all others.
    block_T: int32, into whose memory; that of none that is there: nowhere.
    place_T: int32, where in `ref`, its dims taken as one.
    ref: float32, an array in own shared memory: theirs lies there as well.
  """
  @plgpu.inline_mgpu(arg_types=(BY_THREAD,) * 3 + (plgpu.RefType(),))
  def cluster_send(_, *operands):
    *arrays, ref = operands
    registers = [_register(x) for x in arrays]
    _run_ptx("""{
      .reg .pred there;
      .reg .b32 blocks, address;
      mov.u32 blocks, %cluster_nctarank;
      setp.lt.u32 there, $1, blocks;
      mad.lo.u32 address, $2, 4, $3;
      @there mapa.shared::cluster.u32 address, address, $1;
      @there st.shared::cluster.f32 [address], $0;
    }""", "f,r,r,r,~{memory}", *registers,
             llvm.ptrtoint(ir.IntegerType.get_signless(32),
                           utils.memref_ptr(ref)))

  cluster_send(*(plgpu.layout_cast(x, BY_THREAD)
                 for x in (number_T, block_T, place_T)), ref)


def start_row(gmem, smem) -> None:
  """Starts a warp's copy of a row, in `warp_map`: `wait_for_rows` waits for it.

  A TMA copy has each of the warp's threads arrive at a barrier, twice, which
  takes longer where there are many rows.

  Args:
    gmem: a row of whole 16 bytes.
    smem: where it goes.
  """
  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
  def row_copy(_, gmem, smem):
    ref = ir.MemRefType(gmem.type)
    size = utils.bytewidth(ref.element_type) * math.prod(ref.shape)
    addresses = [
        llvm.ptrtoint(ir.IntegerType.get_signless(bits), utils.memref_ptr(ref))
        for bits, ref in ((64, gmem), (32, smem))]
    copies = "".join(
        f"""setp.lt.u32 within, lane, {size - first};
            @within cp.async.cg.shared.global [to+{first}], [from+{first}], 16;
        """ for first in range(0, size, 512))
    _run_ptx(f"""{{
      .reg .pred within;
      .reg .b32 lane, to;
      .reg .b64 from;
      mov.u32 lane, %laneid;
      shl.b32 lane, lane, 4;
      add.u32 to, $1, lane;
      cvt.u64.u32 from, lane;
      add.u64 from, from, $0;
      {copies}
    }}""", "l,r,~{memory}", *addresses)

  row_copy(gmem, smem)


def wait_for_rows(meanwhile: Callable[[], None]) -> None:
  """Waits for what the thread's warpgroup has started by `start_row`.

  Args:
    meanwhile: called before; what it starts is not waited for.
  """
  @plgpu.inline_mgpu()
  def row_commit(_):
    _run_ptx("cp.async.commit_group;", "~{memory}")

  @plgpu.inline_mgpu()
  def row_wait(_):
    _run_ptx("cp.async.wait_group 0;", "~{memory}")

  row_commit()
  meanwhile()
  row_wait()
  plgpu.commit_smem()  # The other threads have waited as well.


def discard(ref, first, shape: tuple[int, int], columns: int) -> None:
  """Discards numbers from the L2 cache, which holds lines of 128 bytes.

  What lay there is not written to memory: it may hold anything from then on.
  The warpgroup's threads must have read what they need, and have met.

  Args:
    ref: in global memory, from its first row on.
    first: the first column, traced; where a line begins, as every row does.
    shape: how many rows, and columns of each: lines by a power of two.
    columns: that each row has.
  """
  size = jnp.dtype(ref.dtype).itemsize

  @plgpu.inline_mgpu(arg_types=(BY_THREAD, plgpu.RefType()))
  def line_discard(_, start_T, ref):
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64),
                            utils.memref_ptr(ref))
    _run_ptx(f"""{{
      .reg .pred there;
      .reg .b64 address;
      setp.ge.s32 there, $0, 0;
      mad.wide.s32 address, $0, {size}, $1;
      @there discard.global.L2 [address], 128;
    }}""", "r,l,~{memory}", _register(start_T), address)

  line = 128 // size
  rows, lines = shape[0], shape[1] // line
  shift = lines.bit_length() - 1
  index_T = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=BY_THREAD)
  for _ in range(0, rows * lines, 128):
    start_T = (index_T >> shift) * columns + (
        first + (index_T & (lines - 1)) * line)
    line_discard(jnp.where(index_T < rows * lines, start_T, -1), ref)
    index_T += 128


def _register(number_T):
  """A thread's number, of an array in layout `BY_THREAD`."""
  zero = utils.c(0, ir.IntegerType.get_signless(32))
  return llvm.extractelement(number_T.registers.item(), zero)


def _run_ptx(text: str, constraints: str, *operands) -> None:
  llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints,
                  has_side_effects=True)


def log2(x: jax.Array) -> jax.Array:
  """To base 2, of float32: one instruction where math is approximate."""
  if jax.__version_info__ >= (0, 11):
    return jax.lax.log2(x)
  return jax.lax.log(x) * math.log2(math.e)
