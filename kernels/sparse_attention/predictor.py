"""Which keys are kept, and their softmax: from the keys' first parts alone."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.kernels.gaussian import quantile


def products(query_BxKxGxP: jax.Array, key_BxKxSxP: jax.Array) -> jax.Array:
  """Dot products scaled by the width^-0.5, (B, K, G, S) in float32."""
  scores = jnp.einsum("bkgp,bksp->bkgs", query_BxKxGxP, key_BxKxSxP,
                      preferred_element_type=jnp.float32)
  return query_BxKxGxP.shape[-1]**-0.5 * scores


def quantiles(counts: jax.Array, slots: int, top_k: int) -> jax.Array:
  """Q(1 - k/n) in float32, -inf where n <= k, for each count n up to `slots`.

  Looked up: the same rounding as in training, where Q is in float64.
  """
  table = quantile(top_k, np.arange(slots + 1))
  return jnp.asarray(table, jnp.float32)[counts]


def _threshold(scores_BxKxGxS: jax.Array, seen_Bx1x1xS: jax.Array,
               top_k: int) -> jax.Array:
  """mean + std * Q(1 - k/n) over the n visible keys; -inf where n <= k."""
  count = seen_Bx1x1xS.sum(-1, keepdims=True)
  normal = quantiles(count, scores_BxKxGxS.shape[-1], top_k)
  count = jnp.maximum(count, 1)
  mean = scores_BxKxGxS.sum(-1, keepdims=True, where=seen_Bx1x1xS) / count
  squares = jnp.square(scores_BxKxGxS - mean).sum(-1, keepdims=True,
                                                  where=seen_Bx1x1xS)
  # Not mean + std * quantile throughout: 0 * -inf is NaN.
  finite = normal > -jnp.inf
  theta = mean + jnp.sqrt(squares / count) * jnp.where(finite, normal, 0)
  return jnp.where(finite, theta, -jnp.inf)


def visible(lengths_B: jax.Array, window: jax.Array | int, slots: int
            ) -> jax.Array:
  """The slots that a row's newest token sees: (B, S)."""
  slots_S, lengths_Bx1 = jnp.arange(slots), lengths_B[:, None]
  return (slots_S < lengths_Bx1) & (slots_S >= lengths_Bx1 - window)


def softmax(scores: jax.Array, mask: jax.Array, softcap: float) -> jax.Array:
  """Of cap * tanh(scores / cap) where the mask is true; a cap of 0: off."""
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  return jax.nn.softmax(scores, where=mask)


def predict(query1_BxKxGxP: jax.Array, key1_BxKxSxP: jax.Array,
            lengths_B: jax.Array, window: jax.Array | int, top_k: int,
            logit_softcap: float) -> tuple[jax.Array, jax.Array]:
  """Scores the visible keys, keeps about top_k of them.

  Args: as `api.sparse_attention` has them.

  Returns:
    The softmax over each query's kept keys, (B, K, G, S) in float32 and 0 for
    the others; and which keys are kept. A NaN in a visible key keeps all of
    them, so that it shows.
  """
  scores = products(query1_BxKxGxP, key1_BxKxSxP)
  seen_BxS = visible(lengths_B, window, scores.shape[-1])
  seen_Bx1x1xS = seen_BxS[:, None, None]
  theta = _threshold(scores, seen_Bx1x1xS, top_k)
  best = scores.max(-1, keepdims=True, where=seen_Bx1x1xS, initial=-jnp.inf)
  kept = seen_Bx1x1xS & ~(scores < jnp.minimum(theta, best))
  return softmax(scores, kept, logit_softcap), kept
