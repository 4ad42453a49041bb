"""One signature for every implementation of sparse attention.

Letters beside the README's: U = E - P, the head dims that do not predict.
"""

import jax

from sparse_lm.kernels.devices import is_hopper
from sparse_lm.kernels.implementations import Implementations, check_shapes
from sparse_lm.kernels.newest_token import query_of, write_newest

# `reference` is what the others are tested against.
IMPLEMENTATIONS = Implementations("sparse_attention", {
    "xla": "xla", "pallas_gpu": "gpu", "pallas_tpu": "tpu",
    "reference": "reference"})
# Below so many slots, reading all keys is as fast on 2 CPU cores.
_MIN_SLOTS = 2048


def choose(device: jax.Device, top_k: int, query_BxKxGxE: jax.Array,
           key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
           value_BxKxSxE: jax.Array) -> str | None:
  """The implementation that is faster than reading every key.

  Args:
    device: where it is to run.
    top_k: keys that a query aims to keep.
    query_BxKxGxE: as `sparse_attention` has it; shapes and types alone matter.
    key1_BxKxSxP: likewise.
    key2_BxKxSxU: likewise.
    value_BxKxSxE: likewise.

  Returns:
    One of `IMPLEMENTATIONS`; None where there is none: on other GPUs than
    Hopper XLA's loop over blocks would start a program for each, and
    "pallas_tpu" has been compiled but not yet timed on a TPU.
  """
  arrays = query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE
  if is_hopper(device) and not unsupported("pallas_gpu", *arrays):
    return "pallas_gpu"
  # No two queries of a group need keep the same keys.
  group, slots = query_BxKxGxE.shape[2], key1_BxKxSxP.shape[2]
  fast = slots >= max(_MIN_SLOTS, 4 * group * top_k)
  return "xla" if device.platform == "cpu" and fast else None


def unsupported(implementation: str, query_BxKxGxE: jax.Array,
                key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
                value_BxKxSxE: jax.Array) -> str | None:
  """Why an implementation cannot serve, None where it can.

  Args:
    implementation: of `IMPLEMENTATIONS`.
    query_BxKxGxE: as `sparse_attention` has it; shapes and types alone matter.
    key1_BxKxSxP: likewise.
    key2_BxKxSxU: likewise.
    value_BxKxSxE: likewise.

  Raises:
    ValueError: on an unknown implementation.
  """
  return IMPLEMENTATIONS.unsupported(implementation, query_BxKxGxE,
                                     key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE)


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, *, window: jax.Array | int,
                     top_k: int, logit_softcap: float = 0.0,
                     implementation: str | None = None
                     ) -> tuple[jax.Array, jax.Array]:
  """softmax(kept keys' first scores) * softplus(second scores), times values.

  Spark attention (arXiv 2506.06644, Eq. 7) of one query a row to a cache whose
  keys lie in two parts. The first is read whole. Of the second, and of the
  values, only what some query of the group keeps, however many that are: keys
  whose score reaches mean + std * Q(1 - k/n) of the n visible ones, all where
  n <= k, and always the best. Each part's scores are scaled by its width^-0.5.
  Sums are in float32.

  Args:
    query_BxKxGxE: one query for each row and head, both parts.
    key1_BxKxSxP: the keys' first part; slot s is position s.
    key2_BxKxSxU: the rest of them.
    value_BxKxSxE: the values.
    lengths_B: how many positions of each row are filled, the query's included.
    window: how many tokens the query sees, itself included; may be traced.
    top_k: about how many keys a query keeps.
    logit_softcap: cap * tanh(score / cap) before the softmax; 0: off.
    implementation: of `IMPLEMENTATIONS`; None: what `choose` says of the first
      device, or "reference", which reads every key.

  Returns:
    The mixed values (B, K, G, E) in the query's type, and how many keys each
    query keeps, (B, K, G), int32.

  Raises:
    ValueError: on an unknown implementation, one that cannot serve, or shapes
      that do not fit.
  """
  arrays = query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE
  module = _checked(implementation, *arrays, lengths_B, top_k)
  return module.sparse_attention(*arrays, lengths_B, window, top_k,
                                 logit_softcap)


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
                     value_BxKxSxE: jax.Array, lengths_B: jax.Array, *,
                     window: jax.Array | int, top_k: int,
                     logit_softcap: float = 0.0,
                     implementation: str | None = None
                     ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """One token: its key and value are written, then its queries attend.

  Args:
    rows_BxRxE: what a layer projects its token to, R = K G + 2 K rows: queries,
      keys and values, none turned to its position.
    rotary_Bx2xT: cosine and sine of the angle of each pair of dims, T = E / 2:
      i of the first part and P / 2 + i, then those of the second part. The
      first part's pairs come first.
    key1_BxKxSxP: as `sparse_attention` has it, like what follows.
    key2_BxKxSxU: the second parts.
    value_BxKxSxE: the values.
    lengths_B: filled positions, the token's included: it is written to the
      last one, unless that is beyond the slots.
    window: how many tokens the query sees.
    top_k: about how many keys it keeps.
    logit_softcap: of the softmax.
    implementation: as `sparse_attention` has it.

  Returns:
    What `sparse_attention` returns, and the three arrays of the cache, written
    in place where they are not used again.

  Raises:
    ValueError: as `sparse_attention`.
  """
  query = query_of(rows_BxRxE, rotary_Bx2xT, value_BxKxSxE)
  keys = key1_BxKxSxP, key2_BxKxSxU
  module = _checked(implementation, query, *keys, value_BxKxSxE, lengths_B,
                    top_k)
  how = lengths_B, window, top_k, logit_softcap
  if hasattr(module, "write_and_attend"):
    return module.write_and_attend(rows_BxRxE, rotary_Bx2xT, *keys,
                                   value_BxKxSxE, *how)
  query_BxKxGxE, cache = write_newest(rows_BxRxE, rotary_Bx2xT, keys,
                                      value_BxKxSxE, lengths_B)
  return *module.sparse_attention(query_BxKxGxE, *cache, *how), cache


def _checked(implementation: str | None, query_BxKxGxE, key1_BxKxSxP,
             key2_BxKxSxU, value_BxKxSxE, lengths_B, top_k: int):
  """The implementation's module, if it can serve such arrays."""
  b, k, _, e = query_BxKxGxE.shape
  s, p = key1_BxKxSxP.shape[2:]
  check_shapes(("key1_BxKxSxP", key1_BxKxSxP, (b, k, s, p)),
               ("key2_BxKxSxU", key2_BxKxSxU, (b, k, s, e - p)),
               ("value_BxKxSxE", value_BxKxSxE, (b, k, s, e)),
               ("lengths_B", lengths_B, (b,)))
  if top_k < 1:
    raise ValueError(f"top_k={top_k} must be above 0")
  arrays = query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE
  if implementation is None:
    implementation = choose(jax.devices()[0], top_k, *arrays) or "reference"
  return IMPLEMENTATIONS.serving(implementation, *arrays)
