"""One signature for every implementation of Spark attention.

Letters: B batch, L tokens (queries and keys), K key/value heads, G query heads
per key/value head, E head width.
"""

from collections.abc import Callable

import jax

from sparse_lm.kernels.spark_attention import reference, xla

# By name. `reference` is what the others are tested against.
IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla.spark_attention, "reference": reference.spark_attention}


def spark_attention(
    query_BxKxGxLxE: jax.Array, key_BxKxLxE: jax.Array,
    value_BxKxLxE: jax.Array, positions_BxL: jax.Array,
    segments_BxL: jax.Array | None, window: jax.Array | int, *,
    predictor_dim: int, top_k: int, softcap: float = 0.0, block_q: int = 512,
    block_k: int = 512, implementation: str = "xla"
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mixes values by softmax(top-k of scores 1) * softplus(scores 2).

  Scores 1 are scaled dot products of the first `predictor_dim` dims, scores 2
  of the others. Of the keys that a query sees, those are kept whose score 1
  reaches the statistical threshold (mean + quantile * std over the keys seen),
  or is the best; all, where at most `top_k` are seen. The threshold has no
  gradient. Arithmetic is in float32, products take the inputs' type.

  Args:
    query_BxKxGxLxE: queries, rotary positions applied.
    key_BxKxLxE: keys of the same tokens.
    value_BxKxLxE: their values.
    positions_BxL: each token's position in its document. Within a document
      they rise along the row.
    segments_BxL: which document of the row; None: one a row.
    window: how many tokens back a query sees, itself included. Where it is a
      Python number, what lies beyond it is not computed.
    predictor_dim: P, the head dims that predict.
    top_k: about how many keys a query keeps.
    softcap: cap * tanh(scores 1 / cap) enters the softmax; 0: off.
    block_q: queries whose scores exist at a time.
    block_k: keys that they are scored against at a time. Both change memory
      and speed, never the result.
    implementation: a key of `IMPLEMENTATIONS`.

  Returns:
    The mixed values (B, K, G, L, E) in the values' type; how many keys each
    query keeps (B, L), the mean over heads; how many it sees (B, L).

  Raises:
    ValueError: on an unknown implementation, or shapes that do not fit.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is not one of "
                     f"{', '.join(IMPLEMENTATIONS)}")
  b, k, _, l, e = query_BxKxGxLxE.shape
  expected = [("key_BxKxLxE", key_BxKxLxE, (b, k, l, e)),
              ("value_BxKxLxE", value_BxKxLxE,
               (b, k, l, value_BxKxLxE.shape[-1])),
              ("positions_BxL", positions_BxL, (b, l))]
  if segments_BxL is not None:
    expected.append(("segments_BxL", segments_BxL, (b, l)))
  for name, array, shape in expected:
    if array.shape != shape:
      raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
  if not 0 < predictor_dim < e:
    raise ValueError(f"predictor_dim={predictor_dim} is not in (0, {e})")
  return IMPLEMENTATIONS[implementation](
      query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, positions_BxL, segments_BxL,
      window, predictor_dim, top_k, softcap, block_q, block_k)
