"""The operation in plain jax.numpy: every key computed, float32."""

import jax
import jax.numpy as jnp

from sparse_lm.kernels.sparse_attention.predictor import predict, products


def mix_all(query2_BxKxGxU: jax.Array, weights_BxKxGxS: jax.Array,
            kept_BxKxGxS: jax.Array, key2_BxKxSxU: jax.Array,
            value_BxKxSxE: jax.Array) -> jax.Array:
  """Values times weights * softplus(second scores), (B, K, G, E), float32."""
  scores = products(query2_BxKxGxU, key2_BxKxSxU)
  weights = jnp.where(kept_BxKxGxS, weights_BxKxGxS * jax.nn.softplus(scores),
                      0)
  # What stands in a slot that no query keeps must not matter, NaN included.
  read_BxKxSx1 = kept_BxKxGxS.any(2)[..., None]
  return jnp.einsum("bkgs,bkse->bkge", weights,
                    jnp.where(read_BxKxSx1, value_BxKxSxE, 0),
                    preferred_element_type=jnp.float32)


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int, top_k: int,
                     logit_softcap: float) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_attention`."""
  split = key1_BxKxSxP.shape[-1]
  weights, kept = predict(query_BxKxGxE[..., :split], key1_BxKxSxP, lengths_B,
                          window, top_k, logit_softcap)
  y_BxKxGxE = mix_all(query_BxKxGxE[..., split:], weights, kept, key2_BxKxSxU,
                      value_BxKxSxE)
  return y_BxKxGxE.astype(query_BxKxGxE.dtype), kept.sum(-1)
