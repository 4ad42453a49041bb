"""One token's projections: turned, and written to a cache. Plain jax.numpy."""

from collections.abc import Sequence
import itertools

import jax
import jax.numpy as jnp

from sparse_lm.kernels.implementations import check_shapes


def query_of(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
             value_BxKxSxE: jax.Array) -> jax.ShapeDtypeStruct:
  """The queries' shape (B, K, G, E) and type.

  Args:
    rows_BxRxE: as `write_newest` has it, like the others.
    rotary_Bx2xT: cosine and sine.
    value_BxKxSxE: of the cache.

  Raises:
    ValueError: on shapes that do not fit.
  """
  b, k, _, e = value_BxKxSxE.shape
  group = rows_BxRxE.shape[1] // k - 2
  check_shapes(("rows_BxRxE", rows_BxRxE, (b, (max(group, 1) + 2) * k, e)),
               ("rotary_Bx2xT", rotary_Bx2xT, (b, 2, e // 2)))
  return jax.ShapeDtypeStruct((b, k, group, e), rows_BxRxE.dtype)


def _turn(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
          splits: Sequence[int]) -> jax.Array:
  """Rotary positions of each part of a head by itself."""
  turned, first = [], 0
  for part in jnp.split(rows_BxRxE.astype(jnp.float32), splits, -1):
    a, b = jnp.split(part, 2, -1)
    last = first + a.shape[-1]
    cos, sin = (rotary_Bx2xT[:, i, None, first:last] for i in (0, 1))
    turned += [a * cos - b * sin, b * cos + a * sin]
    first = last
  return jnp.concatenate(turned, -1).astype(rows_BxRxE.dtype)


def write_newest(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                 keys: Sequence[jax.Array], value_BxKxSxE: jax.Array,
                 lengths_B: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
  """Turns a token's queries and keys to its position, writes it to the cache.

  Args:
    rows_BxRxE: R = K G + 2 K rows: queries, keys and values.
    rotary_Bx2xT: cosine and sine of the angle of each pair of dims, T = E / 2:
      dims i and W / 2 + i of a part of W dims; the first part's pairs first.
    keys: the cache's, in as many parts as they lie in: (B, K, S, W) each.
    value_BxKxSxE: its values.
    lengths_B: filled positions, the token's included: it is written to the
      last one, unless that is beyond the slots.

  Returns:
    The queries (B, K, G, E), and the arrays of the cache, values last.
  """
  b, kv_heads, _, e = value_BxKxSxE.shape
  splits = list(itertools.accumulate(key.shape[-1] for key in keys[:-1]))
  heads = rows_BxRxE.shape[1] - 2 * kv_heads
  turned_BxRxE = _turn(rows_BxRxE[:, :heads + kv_heads], rotary_Bx2xT, splits)
  query_BxHxE, key_BxKxE = jnp.split(turned_BxRxE, [heads], 1)
  value_BxKxE = rows_BxRxE[:, heads + kv_heads:]
  new = [*jnp.split(key_BxKxE, splits, -1), value_BxKxE]
  caches = [cache.at[jnp.arange(b), :, lengths_B - 1].set(x, mode="drop")
            for cache, x in zip([*keys, value_BxKxSxE], new)]
  return query_BxHxE.reshape(b, kv_heads, -1, e), caches
