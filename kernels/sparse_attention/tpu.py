"""The operation for TPUs: blocks of keys without a kept one are not read.

XLA scores the keys' first parts and lists, for each row and key/value head,
the blocks that hold a kept key. The kernel walks the list and copies a block's
second parts and values from HBM while it multiplies the one before. A key is
too short a row to be copied by itself: a copy of 128 of them takes about as
long as starting one.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sparse_lm.kernels.sparse_attention.predictor import predict

BLOCK = 128  # keys; a register's lanes
# Of 1 MB of scalar memory, for the list of blocks.
_MAX_LISTED = 2**17


def unsupported(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array
                ) -> str | None:
  """As `api.unsupported`."""
  del query_BxKxGxE, key1_BxKxSxP
  b, k, s, width = value_BxKxSxE.shape
  if s % BLOCK:
    return f"{s} slots are not a multiple of {BLOCK}"
  for name, size in (("E - P", key2_BxKxSxU.shape[-1]), ("E", width)):
    if size % 128:
      return f"{name} of {size} is not a multiple of 128"
  if b * k * s // BLOCK > _MAX_LISTED:
    return f"{b} x {k} x {s} keys are too many to list"
  return None


def _body(blocks_ref, counts_ref, query2_ref, weights_ref, key2_ref, value_ref,
          y_ref, key2_buffers, value_buffers, semaphores):
  """One row and key/value head; weights of keys not kept are negative."""
  b, k = pl.program_id(0), pl.program_id(1)
  head = b * pl.num_programs(1) + k
  count, listed = counts_ref[head], weights_ref.shape[0]

  def block(n):
    return blocks_ref[head * listed + n]

  def copies(n):
    keys, slot = pl.ds(block(n) * BLOCK, BLOCK), n % 2
    return [pltpu.make_async_copy(ref.at[b, k, keys], buffers.at[slot],
                                  semaphores.at[i, slot])
            for i, (ref, buffers) in enumerate(
                ((key2_ref, key2_buffers), (value_ref, value_buffers)))]

  def start(n):
    for copy in copies(n):
      copy.start()

  @pl.when(count > 0)
  def _():
    start(0)

  query2_GxU = query2_ref[...]
  scale = query2_GxU.shape[-1]**-0.5

  def add(n, y_GxE):
    @pl.when(n + 1 < count)
    def _():
      start(n + 1)

    for copy in copies(n):
      copy.wait()
    key2, value = key2_buffers[n % 2], value_buffers[n % 2]
    scores = scale * jax.lax.dot_general(
        query2_GxU, key2, (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32)
    softplus = jnp.maximum(scores, 0) + jnp.log1p(jnp.exp(-jnp.abs(scores)))
    weights = weights_ref[block(n)]
    # What stands in a slot that no query keeps must not matter, NaN included.
    highest = jnp.max(weights, axis=0, keepdims=True)
    rows = jnp.broadcast_to(highest, (value.shape[0], BLOCK)).T[:, :1]
    value = jnp.where(rows < 0, 0, value.astype(jnp.float32))
    weights = jnp.where(weights < 0, 0, weights * softplus)
    return y_GxE + jnp.dot(weights.astype(value_ref.dtype),
                           value.astype(value_ref.dtype),
                           preferred_element_type=jnp.float32)

  y_GxE = jax.lax.fori_loop(0, count, add, jnp.zeros(y_ref.shape, jnp.float32))
  y_ref[...] = y_GxE.astype(y_ref.dtype)


def _block_lists(read_NxS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The blocks with a True entry, in order and first; how many they are."""
  live = read_NxS.reshape(read_NxS.shape[0], -1, BLOCK).any(-1)
  # Sorting is stable: live blocks stay in order.
  blocks = jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32)
  return blocks, live.sum(-1, dtype=jnp.int32)


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int, top_k: int,
                     logit_softcap: float) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_attention`."""
  split = key1_BxKxSxP.shape[-1]
  weights, kept = predict(query_BxKxGxE[..., :split], key1_BxKxSxP, lengths_B,
                          window, top_k, logit_softcap)
  b, k, g, s = weights.shape
  width, rest = value_BxKxSxE.shape[-1], key2_BxKxSxU.shape[-1]
  blocks, counts_N = _block_lists(kept.any(2).reshape(b * k, s))
  # Blocks first: the kernel picks one by its index.
  weights = jnp.where(kept, weights, -1).reshape(b, k, g, s // BLOCK, BLOCK)
  head = functools.partial(pl.BlockSpec,
                           index_map=lambda b, k, *_: (b, k, 0, 0))
  y_BxKxGxE = pl.pallas_call(
      _body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(b, k),
          in_specs=[
              head((None, None, g, rest)),
              pl.BlockSpec((None, None, s // BLOCK, g, BLOCK),
                           lambda b, k, *_: (b, k, 0, 0, 0)),
              pl.BlockSpec(memory_space=pl.ANY),
              pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=head((None, None, g, width)),
          scratch_shapes=[
              pltpu.VMEM((2, BLOCK, rest), key2_BxKxSxU.dtype),
              pltpu.VMEM((2, BLOCK, width), value_BxKxSxE.dtype),
              pltpu.SemaphoreType.DMA((2, 2))]),
      out_shape=jax.ShapeDtypeStruct((b, k, g, width), query_BxKxGxE.dtype),
      name="sparse_attention",
  )(blocks.reshape(-1), counts_N, query_BxKxGxE[..., split:],
    weights.swapaxes(2, 3), key2_BxKxSxU, value_BxKxSxE)
  return y_BxKxGxE, kept.sum(-1)
