"""The key/value cache of decoding."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.config import ModelConfig


def write_rows(cached_BxKxSxE: jax.Array, new_BxLxKxE: jax.Array,
               positions_BxL: jax.Array) -> jax.Array:
  """A cache's array with each row's new tokens at their positions.

  Positions beyond its slots are dropped.
  """
  # Heads are indexed, not sliced: XLA's CPU backend turns the write of a single
  # slice into an update that it fuses, a second time beside the cache's own,
  # with what reads it, and copies the whole cache for that.
  # And XLA's GPU backend computes rotary positions within the write, which has
  # few threads, without the barrier.
  new_BxLxKxE = jax.lax.optimization_barrier(new_BxLxKxE)
  batch, heads = cached_BxKxSxE.shape[:2]
  rows_Bx1x1 = jnp.arange(batch)[:, None, None]
  return cached_BxKxSxE.at[
      rows_Bx1x1, jnp.arange(heads), positions_BxL[:, :, None]].set(
          new_BxLxKxE.astype(cached_BxKxSxE.dtype), mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """Keys and values of one layer; slot s of a row holds its position s.

  A row's slots beyond its newest position hold leftovers. No query sees them:
  a query at position p looks at the slots up to p.
  """

  key_BxKxSxE: jax.Array
  value_BxKxSxE: jax.Array

  def write(self, key_BxLxKxE: jax.Array, value_BxLxKxE: jax.Array,
            positions_BxL: jax.Array) -> "LayerCache":
    """The cache with each row's new tokens at their positions."""
    return type(self)(
        write_rows(self.key_BxKxSxE, key_BxLxKxE, positions_BxL),
        write_rows(self.value_BxKxSxE, value_BxLxKxE, positions_BxL))

  @property
  def slots(self) -> int:
    return self.key_BxKxSxE.shape[2]


def empty_cache(config: ModelConfig, batch: int, length: int,
                dtype: jnp.dtype) -> tuple[LayerCache, ...]:
  """A cache of `length` slots for each layer.

  One array pair a layer, so that a decode step with donated buffers writes in
  place.
  """
  shape = (batch, config.attention.num_kv_heads, length,
           config.attention.head_dim)
  return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
               for _ in range(config.num_layers))
