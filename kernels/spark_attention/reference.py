"""The operation in plain jax.numpy: all scores at once, in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.kernels.gaussian import quantile


def seen(positions_BxL: jax.Array, positions_BxS: jax.Array,
         segments_BxL: jax.Array | None, segments_BxS: jax.Array | None,
         window: jax.Array | int) -> jax.Array:
  """True for the keys that a query sees: (B, L, S)."""
  distance_BxLxS = positions_BxL[:, :, None] - positions_BxS[:, None, :]
  mask_BxLxS = (distance_BxLxS >= 0) & (distance_BxLxS < window)
  if segments_BxL is not None:
    mask_BxLxS &= segments_BxL[:, :, None] == segments_BxS[:, None, :]
  return mask_BxLxS


def cap_scores(scores: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(scores / cap); the scores themselves for cap 0."""
  return cap * jnp.tanh(scores / cap) if cap else scores


def spark_attention(query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, positions_BxL,
                    segments_BxL, window, predictor_dim, top_k, softcap,
                    block_q, block_k):
  """As `api.spark_attention`; blocks mean nothing here."""
  del block_q, block_k
  p, (*_, l, e) = predictor_dim, key_BxKxLxE.shape
  wide = jnp.promote_types(query_BxKxGxLxE.dtype, jnp.float32)
  query, key = query_BxKxGxLxE.astype(wide), key_BxKxLxE.astype(wide)
  scores_1, scores_2 = (
      d**-0.5 * jnp.einsum("bkgle,bkse->bkgls", query[..., dims],
                           key[..., dims])
      for d, dims in ((p, slice(p)), (e - p, slice(p, e))))
  mask_BxLxS = seen(positions_BxL, positions_BxL, segments_BxL, segments_BxL,
                    window)
  mask, visible_BxL = mask_BxLxS[:, None, None], mask_BxLxS.sum(-1)
  mean, var = (f(scores_1, -1, keepdims=True, where=mask)
               for f in (jnp.mean, jnp.var))
  table = jnp.asarray(quantile(top_k, np.arange(l + 1)), wide)
  quantile_BxLx1 = table[visible_BxL][:, None, None, :, None]
  theta = jnp.where(quantile_BxLx1 > -jnp.inf,
                    mean + jnp.sqrt(var) * quantile_BxLx1, -jnp.inf)
  best = scores_1.max(-1, keepdims=True, where=mask, initial=-jnp.inf)
  # A NaN that is seen keeps all, so that it shows.
  kept = mask & ~(scores_1 < jnp.minimum(theta, best))
  weights = (jax.nn.softmax(cap_scores(scores_1, softcap), where=kept)
             * jax.nn.softplus(scores_2))
  mixed = jnp.einsum("bkgls,bkse->bkgle", weights, value_BxKxLxE.astype(wide))
  return (mixed.astype(value_BxKxLxE.dtype), kept.sum(-1).mean((1, 2)),
          visible_BxL)
