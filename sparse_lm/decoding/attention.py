"""Attention and its cache laid out for decoding."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from sparse_lm.config import AttentionConfig, ModelConfig
from sparse_lm.decoding.layers import project_rows
from sparse_lm.kernels import dense_attention
from sparse_lm.kernels.sparse_attention import (choose, sparse_attention,
                                                write_and_attend)
from sparse_lm.model.attention import Attention
from sparse_lm.model.cache import LayerCache, empty_cache, write_rows
from sparse_lm.model.layers import rope_angles
from sparse_lm.model.sparsify import sparsify_input


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitCache:
  """A `LayerCache` whose keys lie in two parts, as Spark attention reads them.

  Attributes:
    key1_BxKxSxP: the dims that predict, read for every key.
    key2_BxKxSxU: the others, read for kept keys alone, as values are.
    value_BxKxSxE: the values.
    implementation: the kernel that reads them.
  """

  key1_BxKxSxP: jax.Array
  key2_BxKxSxU: jax.Array
  value_BxKxSxE: jax.Array
  implementation: str = dataclasses.field(metadata={"static": True})

  @property
  def slots(self) -> int:
    return self.key1_BxKxSxP.shape[2]

  @property
  def key_BxKxSxE(self) -> jax.Array:
    """Whole keys, a copy: for a prompt."""
    return jnp.concatenate([self.key1_BxKxSxP, self.key2_BxKxSxU], -1)

  def write(self, key_BxLxKxE: jax.Array, value_BxLxKxE: jax.Array,
            positions_BxL: jax.Array) -> "SplitCache":
    """As `LayerCache.write`."""
    key1, key2 = jnp.split(key_BxLxKxE, [self.key1_BxKxSxP.shape[-1]], axis=-1)
    return SplitCache(
        write_rows(self.key1_BxKxSxP, key1, positions_BxL),
        write_rows(self.key2_BxKxSxU, key2, positions_BxL),
        write_rows(self.value_BxKxSxE, value_BxLxKxE, positions_BxL),
        self.implementation)

  def step(self, rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
           lengths_B: jax.Array, window: jax.Array | int,
           config: AttentionConfig
           ) -> tuple[jax.Array, jax.Array, "SplitCache"]:
    """Writes a token and attends, by "pallas_gpu".

    Args:
      rows_BxRxE: as `kernels.sparse_attention.write_and_attend` has it.
      rotary_Bx2xT: likewise, like the lengths and the window.
      lengths_B: the token's positions, and 1.
      window: of the layer.
      config: the layer's.

    Returns:
      Values mixed (B, K, G, E), keys attended (B,), the cache.
    """
    mixed_BxKxGxE, kept_BxKxG, arrays = write_and_attend(
        rows_BxRxE, rotary_Bx2xT, self.key1_BxKxSxP, self.key2_BxKxSxU,
        self.value_BxKxSxE, lengths_B, window=window, top_k=config.top_k,
        logit_softcap=config.logit_softcap, implementation=self.implementation)
    return (mixed_BxKxGxE, kept_BxKxG.mean((1, 2)),
            SplitCache(*arrays, self.implementation))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelCache(LayerCache):
  """A `LayerCache` that a kernel writes one token to, and attends to whole."""

  implementation = "pallas_gpu"

  def step(self, rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
           lengths_B: jax.Array, window: jax.Array | int,
           config: AttentionConfig
           ) -> tuple[jax.Array, jax.Array, "KernelCache"]:
    """As `SplitCache.step`."""
    mixed_BxKxGxE, arrays = dense_attention.write_and_attend(
        rows_BxRxE, rotary_Bx2xT, self.key_BxKxSxE, self.value_BxKxSxE,
        lengths_B, window=window, logit_softcap=config.logit_softcap,
        implementation=self.implementation)
    return mixed_BxKxGxE, jnp.minimum(lengths_B, window), KernelCache(*arrays)


class CachedAttention(Attention):
  """Attention laid out for decoding.

  Its weights are two matrices of rows, each as long as what it multiplies:
  given columns, XLA's GPU backend writes one token's products with all of a
  matrix to memory before it adds them. Where its cache is a `SplitCache`, one
  query a row reads kept keys alone; a prompt, of many queries, and any other
  cache are computed whole.
  """

  def __init__(self, attention: Attention):
    """Takes over the parameters of `attention`."""
    self.config, self.inputs = attention.config, attention.inputs

    def rows(weights_DxHxE):
      return weights_DxHxE[...].reshape(weights_DxHxE.shape[0], -1).T

    self.in_PxD = nnx.Param(jnp.concatenate(
        [rows(w) for w in (attention.query_DxHxE, attention.key_DxKxE,
                           attention.value_DxKxE)]))
    output_HxExD = attention.output_HxExD[...]
    self.output_DxP = nnx.Param(
        output_HxExD.reshape(-1, output_HxExD.shape[-1]).T)

  def project_in(self, x_BxLxD: jax.Array
                 ) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads, kv_heads = self.config.num_query_heads, self.config.num_kv_heads
    both_BxLxP = project_rows(x_BxLxD, self.in_PxD[...])
    all_BxLxHxE = both_BxLxP.reshape(*x_BxLxD.shape[:2], -1,
                                     self.config.head_dim)
    return tuple(jnp.split(all_BxLxHxE, [heads, heads + kv_heads], axis=2))

  def project_out(self, mixed_BxLxHxE: jax.Array) -> jax.Array:
    mixed_BxLxP = mixed_BxLxHxE.reshape(*mixed_BxLxHxE.shape[:2], -1)
    return project_rows(mixed_BxLxP, self.output_DxP[...])

  def __call__(self, x_BxLxD: jax.Array, positions_BxL: jax.Array,
               segments_BxL: jax.Array | None, window: jax.Array | int,
               cache: LayerCache | SplitCache | None):
    """As `Attention`; one token, where a kernel does all of it, by that."""
    if not self.steps(x_BxLxD, cache):
      return super().__call__(x_BxLxD, positions_BxL, segments_BxL, window,
                              cache)
    x_Bx1xD = sparsify_input(x_BxLxD, self.inputs)
    return self.step(project_rows(x_Bx1xD, self.in_PxD[...]), positions_BxL,
                     window, cache)

  def steps(self, x_BxLxD: jax.Array, cache: LayerCache | SplitCache | None
            ) -> bool:
    """Whether a kernel does all of it: for one token a row."""
    return (x_BxLxD.shape[1] == 1
            and getattr(cache, "implementation", None) == "pallas_gpu")

  def takes_products(self, x_BxLxD: jax.Array,
                     cache: LayerCache | SplitCache | None) -> bool:
    """Whether `step` does, and its input is projected as it is."""
    return self.steps(x_BxLxD, cache) and self.inputs.sparsifier == "none"

  def step(self, product_Bx1xP: jax.Array, positions_Bx1: jax.Array,
           window: jax.Array | int, cache: KernelCache | SplitCache):
    """What follows the first projection, where `steps` holds."""
    batch = product_Bx1xP.shape[0]
    rows_BxRxE = product_Bx1xP.reshape(batch, -1, self.config.head_dim)
    positions_B = positions_Bx1[:, 0]
    # The same in all layers: XLA computes it once.
    angles_BxT = jnp.concatenate(
        [rope_angles(positions_B, width, self.config.rope_base)
         for width in self._turned_widths()], -1)
    rotary_Bx2xT = jnp.stack([jnp.cos(angles_BxT), jnp.sin(angles_BxT)], 1)
    mixed_BxKxGxE, attended_B, cache = cache.step(
        rows_BxRxE, rotary_Bx2xT, positions_B + 1, window, self.config)
    mixed_Bx1xHxE = mixed_BxKxGxE.reshape(
        batch, 1, self.config.num_query_heads, -1)
    mixed_Bx1xHxE = sparsify_input(mixed_Bx1xHxE, self.inputs, axes=2)
    seen_Bx1 = jnp.minimum(positions_Bx1 + 1, window)
    return (self.project_out(mixed_Bx1xHxE), attended_B[:, None], seen_Bx1,
            cache)

  def _turned_widths(self) -> list[int]:
    """Of the parts of a head that rotary positions turn by themselves."""
    width, first = self.config.head_dim, self.config.predictor_dim
    return [first, width - first] if self.config.shape == "spark" else [width]

  def attend_to_cache(self, query_BxKxGxLxE: jax.Array,
                      positions_BxL: jax.Array, cache: LayerCache | SplitCache,
                      window: jax.Array | int
                      ) -> tuple[jax.Array, jax.Array, jax.Array]:
    if not isinstance(cache, SplitCache) or positions_BxL.shape[1] > 1:
      return super().attend_to_cache(query_BxKxGxLxE, positions_BxL, cache,
                                     window)
    lengths_B = positions_BxL[:, 0] + 1
    mixed_BxKxGxE, kept_BxKxG = sparse_attention(
        query_BxKxGxLxE[:, :, :, 0], cache.key1_BxKxSxP, cache.key2_BxKxSxU,
        cache.value_BxKxSxE, lengths_B, window=window, top_k=self.config.top_k,
        logit_softcap=self.config.logit_softcap,
        implementation=cache.implementation)
    return (mixed_BxKxGxE[:, :, :, None], kept_BxKxG.mean((1, 2))[:, None],
            jnp.minimum(lengths_B, window)[:, None])


def choose_attention(config: AttentionConfig, batch: int, slots: int,
                     dtype: jnp.dtype, skip: bool = True) -> str:
  """What attends to a cache of so many slots: "dense", or a kernel.

  Args:
    config: the layers'.
    batch: how many rows.
    slots: of each.
    dtype: of the cache.
    skip: False for whatever computes all keys.
  """
  kv_heads, first, width = (config.num_kv_heads, config.predictor_dim,
                            config.head_dim)

  def like(rows, columns):
    return jax.ShapeDtypeStruct((batch, kv_heads, rows, columns), dtype)

  device = jax.devices()[0]
  query = like(config.num_query_heads // kv_heads, width)
  if config.shape == "dense":
    name = dense_attention.choose(device, query, like(slots, width))
  else:
    name = skip and choose(device, config.top_k, query, like(slots, first),
                           like(slots, width - first), like(slots, width))
  return name or "dense"


def decoding_cache(config: ModelConfig, batch: int, slots: int,
                   dtype: jnp.dtype, implementation: str
                   ) -> tuple[LayerCache | SplitCache, ...]:
  """As `empty_cache`, in the layout that an implementation reads."""
  attention = config.attention
  if implementation == "dense":
    return empty_cache(config, batch, slots, dtype)
  if attention.shape == "dense":
    return tuple(KernelCache(cache.key_BxKxSxE, cache.value_BxKxSxE)
                 for cache in empty_cache(config, batch, slots, dtype))
  first, width = attention.predictor_dim, attention.head_dim

  def zeros(width):
    return jnp.zeros((batch, attention.num_kv_heads, slots, width), dtype)

  return tuple(SplitCache(zeros(first), zeros(width - first), zeros(width),
                          implementation)
               for _ in range(config.num_layers))
