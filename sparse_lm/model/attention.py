"""Grouped-query attention: dense or Spark, global or sliding-window.

Letters beside the README's: G query heads per key/value head (H = K G),
P head dims that predict.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from sparse_lm.config import AttentionConfig, LinearInputsConfig
from sparse_lm.kernels.spark_attention import spark_attention
from sparse_lm.model import sparsify
from sparse_lm.model.cache import LayerCache
from sparse_lm.model.layers import normal_param, project, rope, softcap
from sparse_lm.model.sharding import constrain


def visible(positions_BxL: jax.Array, positions_BxS: jax.Array,
            segments_BxL: jax.Array | None, segments_BxS: jax.Array | None,
            window: jax.Array | int) -> jax.Array:
  """Which keys a query may see: (B, L, S), True for those it may.

  Keys at or before the query's position, fewer than `window` tokens back, of
  the same document. Positions count from each document's start.
  """
  distance_BxLxS = positions_BxL[:, :, None] - positions_BxS[:, None, :]
  seen = (distance_BxLxS >= 0) & (distance_BxLxS < window)
  if segments_BxL is not None:
    seen &= segments_BxL[:, :, None] == segments_BxS[:, None, :]
  return seen


def _scores(query_BxKxGxLxE: jax.Array, key_BxKxSxE: jax.Array) -> jax.Array:
  """Scaled dot products in float32: (B, K, G, L, S).

  Heads come before positions, and a group's queries are one matrix's rows:
  XLA's CPU backend copies the scores transposed in any other order.
  """
  b, k, g, l, e = query_BxKxGxLxE.shape
  scores = jnp.einsum("bkqe,bkse->bkqs",
                      query_BxKxGxLxE.reshape(b, k, g * l, e), key_BxKxSxE,
                      preferred_element_type=jnp.float32)
  return e**-0.5 * scores.reshape(b, k, g, l, -1)


def mix(weights_BxKxGxLxS: jax.Array, value_BxKxSxE: jax.Array) -> jax.Array:
  """Values summed with the weights, (B, K, G, L, E), in the values' type."""
  b, k, g, l, s = weights_BxKxGxLxS.shape
  weights = weights_BxKxGxLxS.astype(value_BxKxSxE.dtype)
  mixed = jnp.einsum("bkqs,bkse->bkqe", weights.reshape(b, k, g * l, s),
                     value_BxKxSxE)
  return mixed.reshape(b, k, g, l, -1)


def dense_weights(query_BxKxGxLxE: jax.Array, key_BxKxSxE: jax.Array,
                  seen_BxLxS: jax.Array,
                  config: AttentionConfig) -> tuple[jax.Array, jax.Array]:
  """softmax over the visible keys, and which keys have weight.

  Returns:
    weights (B, K, G, L, S) in float32 and a mask broadcastable to them.
  """
  mask = seen_BxLxS[:, None, None]
  scores = softcap(_scores(query_BxKxGxLxE, key_BxKxSxE), config.logit_softcap)
  return jax.nn.softmax(scores, where=mask), mask


def spark_weights(query_BxKxGxLxE: jax.Array, key_BxKxSxE: jax.Array,
                  seen_BxLxS: jax.Array,
                  config: AttentionConfig) -> tuple[jax.Array, jax.Array]:
  """softmax(top-k of the first P dims' scores) * softplus(the other dims').

  arXiv 2506.06644, Eq. 7. Where the paper is silent: each part's scores are
  scaled by its width^-0.5; statistics are over the visible keys alone, and all
  are kept where there are at most k; the soft-cap acts on the scores that the
  softmax sees, after the threshold has been taken from the raw ones (it is
  monotone, so the ranking is the same); the best key is kept whatever the
  threshold, so that no row is empty.

  Returns:
    As `dense_weights`. The weights of a query do not sum to 1.
  """
  split = [config.predictor_dim]
  query_1, query_2 = jnp.split(query_BxKxGxLxE, split, axis=-1)
  key_1, key_2 = jnp.split(key_BxKxSxE, split, axis=-1)
  mask = seen_BxLxS[:, None, None]
  scores = _scores(query_1, key_1)
  raw = jax.lax.stop_gradient(scores)
  theta = sparsify.statistical_threshold(raw, config.top_k, where=mask)
  best = raw.max(-1, keepdims=True, where=mask, initial=-jnp.inf)
  kept = mask & (raw >= jnp.minimum(theta, best))
  weights = jax.nn.softmax(softcap(scores, config.logit_softcap), where=kept)
  return weights * jax.nn.softplus(_scores(query_2, key_2)), kept


WEIGHTS = {"dense": dense_weights, "spark": spark_weights}


class Attention(nnx.Module):
  """Projections, rotary positions, weights of the configured shape."""

  def __init__(self, config: AttentionConfig, inputs: LinearInputsConfig,
               model_dim: int, rngs: nnx.Rngs):
    heads, kv_heads, width = (config.num_query_heads, config.num_kv_heads,
                              config.head_dim)
    self.config, self.inputs = config, inputs
    self.query_DxHxE = normal_param(rngs, (model_dim, heads, width), model_dim)
    self.key_DxKxE = normal_param(rngs, (model_dim, kv_heads, width), model_dim)
    self.value_DxKxE = normal_param(rngs, (model_dim, kv_heads, width),
                                    model_dim)
    self.output_HxExD = normal_param(rngs, (heads, width, model_dim),
                                     heads * width)

  def _rope(self, x: jax.Array, positions_BxL: jax.Array) -> jax.Array:
    """Rotary positions, on each of Spark's two parts by itself."""
    split = ([self.config.predictor_dim] if self.config.shape == "spark"
             else [])
    parts = jnp.split(x, split, axis=-1)
    return jnp.concatenate(
        [rope(p, positions_BxL, self.config.rope_base) for p in parts], -1)

  def _attend(self, query_BxKxGxLxE: jax.Array, positions_BxL: jax.Array,
              segments_BxL: jax.Array | None, keys: dict,
              window: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values mixed for some of the queries; keys attended; keys visible."""
    seen_BxLxS = visible(positions_BxL, keys["positions"], segments_BxL,
                         keys["segments"], window)
    weights, kept = WEIGHTS[self.config.shape](query_BxKxGxLxE, keys["key"],
                                               seen_BxLxS, self.config)
    # Kept keys, averaged over the heads (one, where the heads share a mask).
    attended_BxL = kept.sum(-1).mean((1, 2))
    return mix(weights, keys["value"]), attended_BxL, seen_BxLxS.sum(-1)

  def __call__(self, x_BxLxD: jax.Array, positions_BxL: jax.Array,
               segments_BxL: jax.Array | None, window: jax.Array,
               cache: LayerCache | None):
    """Attends from x to itself, or to a cache that x is first written to.

    Args:
      x_BxLxD: the layer's input.
      positions_BxL: positions within the document.
      segments_BxL: which document, or None for one document a row.
      window: how many tokens a query sees, itself included.
      cache: the layer's cache; then there is one document a row.

    Returns:
      The output (B, L, D), keys attended (B, L; mean over heads), keys visible
      (B, L), and the cache with x's keys and values (None without one).
    """
    x_BxLxD = sparsify.sparsify_input(x_BxLxD, self.inputs)
    query_BxLxHxE, key, value = self.project_in(x_BxLxD)
    query_BxLxHxE = self._rope(query_BxLxHxE, positions_BxL)
    key = self._rope(key, positions_BxL)
    b, l, h, e = query_BxLxHxE.shape
    query = query_BxLxHxE.reshape(b, l, self.config.num_kv_heads, -1, e)
    query_BxKxGxLxE = query.transpose(0, 2, 3, 1, 4)
    if cache is None:
      keys = dict(key=key.swapaxes(1, 2), value=value.swapaxes(1, 2),
                  positions=positions_BxL, segments=segments_BxL)
      in_blocks = (self.config.shape == "spark"
                   and 0 < self.config.query_chunk < l)
      attend = self._attend_in_blocks if in_blocks else self._attend_in_chunks
      mixed, attended, seen = attend(query_BxKxGxLxE, positions_BxL,
                                     segments_BxL, keys, window)
    else:
      cache = cache.write(key, value, positions_BxL)
      mixed, attended, seen = self.attend_to_cache(
          query_BxKxGxLxE, positions_BxL, cache, window)
    mixed_BxLxHxE = mixed.transpose(0, 3, 1, 2, 4).reshape(b, l, h, e)
    mixed_BxLxHxE = sparsify.sparsify_input(mixed_BxLxHxE, self.inputs, axes=2)
    return self.project_out(mixed_BxLxHxE), attended, seen, cache

  def project_in(self, x_BxLxD: jax.Array
                 ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, L, H, E), keys and values (B, L, K, E)."""
    query_BxLxHxE, key_BxLxKxE, value_BxLxKxE = (
        constrain(project(x_BxLxD, w[...]), "BxLxHxE")
        for w in (self.query_DxHxE, self.key_DxKxE, self.value_DxKxE))
    return query_BxLxHxE, key_BxLxKxE, value_BxLxKxE

  def project_out(self, mixed_BxLxHxE: jax.Array) -> jax.Array:
    """The output (B, L, D)."""
    return project(mixed_BxLxHxE, self.output_HxExD[...], in_axes=2)

  def _attend_in_blocks(self, query_BxKxGxLxE, positions_BxL, segments_BxL,
                        keys, window):
    """`_attend` of a whole sequence to itself, no array of it being L x L."""
    config = self.config
    return spark_attention(
        query_BxKxGxLxE, keys["key"], keys["value"], positions_BxL,
        segments_BxL, window, predictor_dim=config.predictor_dim,
        top_k=config.top_k, softcap=config.logit_softcap,
        block_q=config.query_chunk, block_k=config.query_chunk)

  def attend_to_cache(self, query_BxKxGxLxE: jax.Array,
                      positions_BxL: jax.Array, cache: LayerCache,
                      window: jax.Array | int
                      ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values mixed (B, K, G, L, E); keys attended, keys visible (B, L)."""
    keys = dict(key=cache.key_BxKxSxE, value=cache.value_BxKxSxE,
                positions=jnp.arange(cache.slots)[None], segments=None)
    return self._attend_in_chunks(query_BxKxGxLxE, positions_BxL, None, keys,
                                  window)

  def _attend_in_chunks(self, query_BxKxGxLxE, positions_BxL, segments_BxL,
                        keys, window):
    """`_attend`, `query_chunk` queries at a time where that is asked for.

    Exact: a query's weights depend on no other query. Memory is linear in L,
    since each chunk's weights are computed again in the backward pass.
    """
    chunk, length = self.config.query_chunk, query_BxKxGxLxE.shape[3]
    if not chunk or length <= chunk or length % chunk:
      return self._attend(query_BxKxGxLxE, positions_BxL, segments_BxL, keys,
                          window)

    def split(x, axis):
      """Chunks first."""
      shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1:])
      return jnp.moveaxis(x.reshape(shape), axis, 0)

    def join(x, axis):
      x = jnp.moveaxis(x, 0, axis)
      return x.reshape(*x.shape[:axis], length, *x.shape[axis + 2:])

    queries = (split(query_BxKxGxLxE, 3), split(positions_BxL, 1),
               None if segments_BxL is None else split(segments_BxL, 1))
    mixed, attended, seen = jax.lax.map(
        jax.checkpoint(lambda part: self._attend(*part, keys, window)),
        queries)
    return join(mixed, 3), join(attended, 1), join(seen, 1)


def layer_windows(config: AttentionConfig, num_layers: int) -> list[int]:
  """How many tokens a query of each layer sees, itself included."""
  everything = 2**30
  if not config.sliding_window:
    return [everything] * num_layers
  return [everything if (i + 1) % config.global_every == 0
          else config.sliding_window for i in range(num_layers)]
