"""One signature for every implementation of Spark attention.

Letters: B batch, L tokens (queries and keys), K key/value heads, G query heads
per key/value head, E head width.
"""

import math

import jax

from sparse_lm.kernels.devices import is_hopper
from sparse_lm.kernels.implementations import Implementations, check_shapes

# `reference` is what the others are tested against.
IMPLEMENTATIONS = Implementations("spark_attention", {
    "xla": "xla", "pallas_gpu": "gpu", "reference": "reference"})


def unsupported(implementation: str, query_BxKxGxLxE: jax.Array,
                value_BxKxLxE: jax.Array, predictor_dim: int) -> str | None:
  """Why an implementation cannot take such arrays, None where it can.

  Args:
    implementation: of `IMPLEMENTATIONS`.
    query_BxKxGxLxE: as `spark_attention` has it, like the others; or a
      `jax.ShapeDtypeStruct`.
    value_BxKxLxE: the values.
    predictor_dim: P.

  Raises:
    ValueError: on an unknown implementation.
  """
  return IMPLEMENTATIONS.unsupported(implementation, query_BxKxGxLxE,
                                     value_BxKxLxE, predictor_dim)


def _split_by_compiler() -> bool:
  """Whether arrays may be spread over devices, which kernels know nothing of.

  Where `jax.set_mesh` has said so, and no `jax.shard_map` of all axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and math.prod(
      size for axis, size in mesh.shape.items()
      if axis not in mesh.manual_axes) > 1


def choose(device: jax.Device, query_BxKxGxLxE: jax.Array,
           value_BxKxLxE: jax.Array, predictor_dim: int) -> str:
  """The fastest implementation.

  Args:
    device: what it would run on.
    query_BxKxGxLxE: as for `unsupported`, like the others.
    value_BxKxLxE: the values.
    predictor_dim: P.

  Returns:
    One of `IMPLEMENTATIONS`.
  """
  served = is_hopper(device) and not _split_by_compiler()
  if served and not unsupported("pallas_gpu", query_BxKxGxLxE, value_BxKxLxE,
                                predictor_dim):
    return "pallas_gpu"
  return "xla"


def spark_attention(
    query_BxKxGxLxE: jax.Array, key_BxKxLxE: jax.Array,
    value_BxKxLxE: jax.Array, positions_BxL: jax.Array,
    segments_BxL: jax.Array | None, window: jax.Array | int, *,
    predictor_dim: int, top_k: int, softcap: float = 0.0, block_q: int = 512,
    block_k: int = 512, implementation: str | None = None
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
    block_q: queries whose scores exist at a time, with "xla".
    block_k: keys that they are scored against at a time, with "xla". Both
      change memory and speed, never the result.
    implementation: of `IMPLEMENTATIONS`; None: what `choose` says of the
      first device. "pallas_gpu" is of one device's arrays: on a mesh it
      needs `jax.shard_map`, and is not chosen without.

  Returns:
    The mixed values (B, K, G, L, E) in the values' type; how many keys each
    query keeps (B, L), the mean over heads; how many it sees (B, L).

  Raises:
    ValueError: on an unknown implementation, one that cannot serve, or shapes
      that do not fit.
  """
  b, k, _, l, e = query_BxKxGxLxE.shape
  expected = [("key_BxKxLxE", key_BxKxLxE, (b, k, l, e)),
              ("value_BxKxLxE", value_BxKxLxE,
               (b, k, l, value_BxKxLxE.shape[-1])),
              ("positions_BxL", positions_BxL, (b, l))]
  if segments_BxL is not None:
    expected.append(("segments_BxL", segments_BxL, (b, l)))
  check_shapes(*expected)
  if key_BxKxLxE.dtype != query_BxKxGxLxE.dtype:
    raise ValueError(f"key_BxKxLxE is {key_BxKxLxE.dtype}, expected the "
                     f"query's {query_BxKxGxLxE.dtype}")
  if not 0 < predictor_dim < e:
    raise ValueError(f"predictor_dim={predictor_dim} is not in (0, {e})")
  if top_k < 1:
    raise ValueError(f"top_k={top_k} must be above 0")
  of_kernel = query_BxKxGxLxE, value_BxKxLxE, predictor_dim
  implementation = implementation or choose(jax.devices()[0], *of_kernel)
  return IMPLEMENTATIONS.serving(implementation, *of_kernel).spark_attention(
      query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, positions_BxL, segments_BxL,
      window, predictor_dim, top_k, softcap, block_q, block_k)
