"""One signature for every implementation of dense attention of one token."""

import jax

from sparse_lm.kernels.devices import is_hopper
from sparse_lm.kernels.implementations import Implementations, check_shapes
from sparse_lm.kernels.newest_token import query_of

# `reference` is what the other is tested against.
IMPLEMENTATIONS = Implementations(
    "dense_attention", {"pallas_gpu": "gpu", "reference": "reference"})


def unsupported(implementation: str, query_BxKxGxE: jax.Array,
                key_BxKxSxE: jax.Array) -> str | None:
  """Why an implementation cannot serve, None where it can.

  Args:
    implementation: of `IMPLEMENTATIONS`.
    query_BxKxGxE: one query for each row and head; shapes and types alone
      matter.
    key_BxKxSxE: the cache's keys, like its values.

  Raises:
    ValueError: on an unknown implementation.
  """
  return IMPLEMENTATIONS.unsupported(implementation, query_BxKxGxE, key_BxKxSxE)


def choose(device: jax.Device, query_BxKxGxE: jax.Array,
           key_BxKxSxE: jax.Array) -> str | None:
  """The implementation that is faster than XLA's kernels.

  Args:
    device: what it would run on.
    query_BxKxGxE: as for `unsupported`, like the other.
    key_BxKxSxE: the cache's keys.

  Returns:
    One of `IMPLEMENTATIONS`; None where there is none: elsewhere than on
    Hopper.
  """
  served = is_hopper(device) and not unsupported("pallas_gpu", query_BxKxGxE,
                                                 key_BxKxSxE)
  return "pallas_gpu" if served else None


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key_BxKxSxE: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, *, window: jax.Array | int,
                     logit_softcap: float = 0.0,
                     implementation: str | None = None
                     ) -> tuple[jax.Array, list[jax.Array]]:
  """One token: its key and value are written, then its queries attend.

  Args:
    rows_BxRxE: what a layer projects its token to, R = K G + 2 K rows: queries,
      keys and values, none turned to its position.
    rotary_Bx2xT: cosine and sine of the angle that dims i and T + i turn by,
      T = E / 2.
    key_BxKxSxE: the cache's keys; slot s is position s.
    value_BxKxSxE: its values.
    lengths_B: filled positions, the token's included: it is written to the
      last one, unless that is beyond the slots.
    window: how many tokens the query sees, itself included; may be traced.
    logit_softcap: cap * tanh(score / cap) before the softmax; 0: off.
    implementation: of `IMPLEMENTATIONS`; None: what `choose` says of the first
      device, or "reference".

  Returns:
    The mixed values (B, K, G, E), and the two arrays of the cache, written in
    place where they are not used again.

  Raises:
    ValueError: on an unknown implementation, one that cannot serve, or shapes
      that do not fit.
  """
  query = query_of(rows_BxRxE, rotary_Bx2xT, value_BxKxSxE)
  check_shapes(("key_BxKxSxE", key_BxKxSxE, value_BxKxSxE.shape),
               ("lengths_B", lengths_B, value_BxKxSxE.shape[:1]))
  if implementation is None:
    implementation = (choose(jax.devices()[0], query, key_BxKxSxE)
                      or "reference")
  module = IMPLEMENTATIONS.serving(implementation, query, key_BxKxSxE)
  return module.write_and_attend(rows_BxRxE, rotary_Bx2xT, key_BxKxSxE,
                                 value_BxKxSxE, lengths_B, window,
                                 logit_softcap)
