"""Dense attention for one token a row: what it takes, and where."""

import jax

from sparse_lm.kernels.devices import generation


def _gpu():
  # Lazy: Pallas takes a while to import.
  from sparse_lm.kernels.dense_attention import gpu  # pylint: disable=g-import-not-at-top
  return gpu


def unsupported(query_BxKxGxE: jax.Array, key_BxKxSxE: jax.Array) -> str | None:
  """Why the kernel cannot serve, None where it can.

  Args:
    query_BxKxGxE: one query for each row and head; shapes and types alone
      matter.
    key_BxKxSxE: the cache's keys, like its values.
  """
  return _gpu().unsupported(query_BxKxGxE, key_BxKxSxE)


def choose(device: jax.Device, query_BxKxGxE: jax.Array,
           key_BxKxSxE: jax.Array) -> str | None:
  """"pallas_gpu" where that is faster than XLA, on Hopper; None elsewhere."""
  if generation(device) != 9 or unsupported(query_BxKxGxE, key_BxKxSxE):
    return None
  return "pallas_gpu"


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key_BxKxSxE: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, *, window: jax.Array | int,
                     logit_softcap: float = 0.0
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

  Returns:
    The mixed values (B, K, G, E), and the two arrays of the cache, written in
    place where they are not used again.

  Raises:
    ValueError: on what `unsupported` says.
  """
  b, k, _, e = key_BxKxSxE.shape
  group = rows_BxRxE.shape[1] // k - 2
  query = jax.ShapeDtypeStruct((b, k, group, e), rows_BxRxE.dtype)
  reason = unsupported(query, key_BxKxSxE)
  if reason:
    raise ValueError(reason)
  return _gpu().write_and_attend(rows_BxRxE, rotary_Bx2xT, key_BxKxSxE,
                                 value_BxKxSxE, lengths_B, group, window,
                                 logit_softcap)
