"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

One kernel. A cluster's blocks multiply a key/value head's first key parts with
the group's queries, keep the scores in shared memory, and hand each other their
statistics. Then each warpgroup lists the keys that some query keeps, copies
their second parts and values, and adds those up; in small caches it has copied
all of them before. What blocks have is added up in a fixed order: the same
result every time.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels import token_attention
from sparse_lm.kernels.sparse_attention.gpu_keys import (
    BATCHES, PART, WIDTH, Memory, Warpgroup)
from sparse_lm.kernels.sparse_attention.predictor import quantiles
from sparse_lm.kernels.sparse_attention.statistics import state_memory
from sparse_lm.kernels.token_attention import (
    KEYS, OWN, WARPS, Place, block_sync, fetch_rows, join, join_memory, kernel,
    make_bounds, own_keys, rows_memory)

# Rounds up to which all is copied, before it is known which keys are visible
# and kept: the wait for that takes longer. For more queries it does not fit.
_EAGER_ROUNDS, _EAGER_QUERIES = 2, 4
# Bytes of shared memory that first parts, scores and lists may fill, less those
# that each query takes elsewhere: the rest, of 227 KB, is for values and sums.
_FIRST_PARTS, _QUERY = 96 * 1024, 2 * 1024


def unsupported(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array
                ) -> str | None:
  """As `api.unsupported`."""
  (b, k, group, e), (*_, slots, p) = query_BxKxGxE.shape, key1_BxKxSxP.shape
  for name, size, wanted in (("P", p, PART), ("E", e, WIDTH)):
    if size != wanted:
      return f"{name} of {size} is not {wanted}"
  reason = token_attention.unsupported(
      (query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE), group)
  if not reason and not _cluster_size(b * k, slots, group):
    return (f"scores of {slots} slots and {group} queries do not fit in shared "
            "memory")
  return reason


def _rounds(slots: int, cluster: int) -> int:
  """How many rounds there are at most, in whole twos."""
  return 2 * pl.cdiv(slots, 2 * token_attention.span() * cluster)


def _cluster_size(heads: int, slots: int, group: int) -> int | None:
  """How many blocks share a head; None where no number has the memory."""
  size = token_attention.cluster_size(heads, slots)
  while size <= token_attention.CLUSTER:
    if _stages(_rounds(slots, size), group) >= BATCHES:
      return size
    size *= 2
  return None


def _stages(rounds: int, group: int) -> int:
  """How many rounds' first parts have a place at a time."""
  span = token_attention.span()
  left = _FIRST_PARTS - group * _QUERY - rounds * span * (group + 1) * 4
  return min(rounds, left // (span * PART * 2))


def _scratch(group: int, slots: int, cluster: int) -> dict:
  """Shared memory, by `Memory`'s names."""
  parts, rounds = token_attention.PARTS, _rounds(slots, cluster)

  def rows(stages, width):
    return plgpu.SMEM((parts, stages, WARPS, KEYS, width), jnp.bfloat16)

  def barrier(stages, arrivals):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=parts * stages)

  score = plgpu.SMEM((group, parts, rounds * WARPS, KEYS), jnp.float32)
  two = plgpu.SMEM((2, parts, group, WARPS, KEYS), jnp.float32)
  one = plgpu.SMEM((group,), jnp.float32)
  shared = rows_memory(group, WIDTH) | dict(
      score_smem=score, least_smem=one, best_smem=one, weight_smem=two,
      state_smem=state_memory(group))
  if rounds <= _EAGER_ROUNDS and group <= _EAGER_QUERIES:
    return shared | dict(
        key1_smem=rows(rounds, PART), key2_smem=rows(rounds, PART),
        value_smem=rows(rounds, WIDTH), second_smem=score,
        key1_barrier=barrier(rounds, 1), rest_barrier=barrier(rounds, 2))
  stages = _stages(rounds, group)
  return shared | dict(
      key1_smem=rows(stages, PART), value_smem=rows(BATCHES, WIDTH),
      list_smem=plgpu.SMEM((parts, rounds * OWN), jnp.int32), picked_smem=two,
      key1_barrier=barrier(stages, 1))


def _attend(heads, cluster, group, write, softcap, *refs, **scratch) -> None:
  """A head's results.

  Args:
    heads: key/value heads of a row.
    cluster: blocks of each.
    group: queries of each.
    write: whether to turn the rows and write the newest; not what turns them
      nor what follows the queries is read otherwise.
    softcap: of the logits.
    *refs: as `Memory` has them.
    **scratch: likewise.
  """
  at, m = Place(heads, cluster), Memory(*refs, **scratch)
  mine = Warpgroup(at, m, write, softcap)
  put_rows = fetch_rows(at, group, [PART, WIDTH - PART], m.rows_gmem,
                        m.rotary_gmem if write else None)
  mine.see()
  mine.start_copies()
  put_rows(m.query_smem, m.newest_smem)
  block_sync(m.block_barrier)
  mine.score_all()
  block_sync(m.block_barrier)
  mine.find_thresholds()

  def finish(g, first, total, divisor, count):
    mosaic_gpu.store(m.y_gmem.at[at.head, g, pl.ds(first, total.shape[0])],
                     (total / divisor).astype(m.y_gmem.dtype))

    @pl.when(first == 0)
    def _():
      m.count_gmem[at.head, g] = count.astype(jnp.int32)

  join(at, m, *mine.mix(), finish)


# Lowered once for all layers.
@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _call(write, rows_BxRxE, rotary_Bx2xT, caches, bounds_Bx3, group, top_k,
          logit_softcap):
  """The kernel.

  Args:
    write: as `_attend` has it.
    rows_BxRxE: as `fetch_rows` has them.
    rotary_Bx2xT: likewise.
    caches: first parts, second parts and values, each (B, K, S, width).
    bounds_Bx3: as `make_bounds` makes it.
    group: query heads per key/value head.
    top_k: as `api.sparse_attention` has it, like `logit_softcap`.
    logit_softcap: of the scores that the softmax sees.

  Returns:
    Results (B, K, G, E), counts (B, K, G), and the caches as they are then.
  """
  b, k, s, width = caches[2].shape
  heads = b * k
  cluster = _cluster_size(heads, s, group)
  keys = [own_keys(x) for x in caches]
  if write:
    keys = [jax.new_ref(x) for x in keys]
  quantile_B = quantiles(bounds_Bx3[:, 1] - bounds_Bx3[:, 0], s, top_k)
  y, counts = kernel(
      functools.partial(_attend, k, cluster, group, write, logit_softcap),
      (jax.ShapeDtypeStruct((heads, group, width), rows_BxRxE.dtype),
       jax.ShapeDtypeStruct((heads, group), jnp.int32)),
      heads, cluster, **_scratch(group, s, cluster),
      **join_memory(group, width, cluster))(
          bounds_Bx3, quantile_B, rows_BxRxE, rotary_Bx2xT, *keys)
  if write:
    keys = [jax.freeze(x) for x in keys]
  return (y.reshape(b, k, group, width), counts.reshape(b, k, group),
          [x.reshape(c.shape) for x, c in zip(keys, caches)])


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int, top_k: int,
                     logit_softcap: float) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_attention`; what it serves, `unsupported` says."""
  b, k, g, e = query_BxKxGxE.shape
  bounds_Bx3 = make_bounds(lengths_B, window, key1_BxKxSxP.shape[2])
  # There is nothing to turn.
  rotary_Bx2xT = jnp.zeros((b, 2, e // 2), jnp.float32)
  return _call(False, query_BxKxGxE.reshape(b, k * g, e), rotary_Bx2xT,
               (key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE), bounds_Bx3, g,
               top_k, logit_softcap)[:2]


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
                     value_BxKxSxE: jax.Array, lengths_B: jax.Array,
                     window: jax.Array | int, top_k: int, logit_softcap: float
                     ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """As `api.write_and_attend`; what it serves, `unsupported` says."""
  group = rows_BxRxE.shape[1] // value_BxKxSxE.shape[1] - 2
  bounds_Bx3 = make_bounds(lengths_B, window, key1_BxKxSxP.shape[2])
  return _call(True, rows_BxRxE, rotary_Bx2xT,
               (key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE), bounds_Bx3, group,
               top_k, logit_softcap)
