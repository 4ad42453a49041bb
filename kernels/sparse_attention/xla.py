"""The operation in XLA: kept keys are read in small blocks of rows.

For each row and key/value head a loop over the keys that its group keeps
gathers a block of their second parts and values where they lie. Where so many
are kept that reading everything is faster, it reads everything; the result is
the same.
"""

import jax
import jax.numpy as jnp

from sparse_lm.kernels.sparse_attention.predictor import predict
from sparse_lm.kernels.sparse_attention.reference import mix_all

# Rows are gathered while fewer than this fraction of all is kept. Found on 2
# CPU cores: a row gathered takes as long as two to three read in order.
GATHER_BELOW = 1 / 3
# Rows in one turn of the loop: of 16 to 256, the fastest from 2,048 slots on.
_ROWS = 128


def _kept_rows(read_S: jax.Array, size: int) -> jax.Array:
  """Indices of the True entries in order, then the first one up to `size`."""
  place_S = jnp.where(read_S, jnp.cumsum(read_S) - 1, size)
  # Not 0 beyond the last: a row that is not kept must not be read, lest NaN.
  rows = jnp.full(size, jnp.argmax(read_S), jnp.int32)
  return rows.at[place_S].set(jnp.arange(read_S.size, dtype=jnp.int32),
                              mode="drop", unique_indices=True)


def _gathered(query2_BxKxGxU: jax.Array, weights_BxKxGxS: jax.Array,
              kept_BxKxGxS: jax.Array, key2_BxKxSxU: jax.Array,
              value_BxKxSxE: jax.Array) -> jax.Array:
  """As `reference.mix_all`, from the kept rows alone."""
  b, k, s, width = value_BxKxSxE.shape
  # Rows of all heads in one array: a head's slice would be a copy of it.
  key2 = key2_BxKxSxU.reshape(b * k * s, -1)
  value = value_BxKxSxE.reshape(b * k * s, width)
  # Whole turns, so that no block of rows is shifted at the end.
  size = -(-s // _ROWS) * _ROWS

  def head(inputs):
    index, query2_GxU, weights_GxS, kept_GxS = inputs
    read_S = kept_GxS.any(0)
    rows, count = _kept_rows(read_S, size), read_S.sum()
    scale = query2_GxU.shape[-1]**-0.5

    def add(turn, y_GxE):
      here = jax.lax.dynamic_slice_in_dim(rows, turn * _ROWS, _ROWS)
      valid = turn * _ROWS + jnp.arange(_ROWS) < count

      def get(x):
        return x.at[index * s + here].get(mode="promise_in_bounds")

      scores = scale * jnp.dot(query2_GxU, get(key2).T,
                               preferred_element_type=jnp.float32)
      weights = weights_GxS.at[:, here].get(mode="promise_in_bounds")
      weights = jnp.where(valid, weights * jax.nn.softplus(scores), 0)
      return y_GxE + jnp.dot(weights, get(value),
                             preferred_element_type=jnp.float32)

    zero_GxE = jnp.zeros((query2_GxU.shape[0], width), jnp.float32)
    return jax.lax.fori_loop(0, -(-count // _ROWS), add, zero_GxE)

  heads = [x.reshape(b * k, *x.shape[2:])
           for x in (query2_BxKxGxU, weights_BxKxGxS, kept_BxKxGxS)]
  y = jax.lax.map(head, (jnp.arange(b * k), *heads))
  return y.reshape(b, k, -1, width)


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int, top_k: int,
                     logit_softcap: float) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_attention`."""
  split = key1_BxKxSxP.shape[-1]
  weights, kept = predict(query_BxKxGxE[..., :split], key1_BxKxSxP, lengths_B,
                          window, top_k, logit_softcap)
  few = kept.any(2).mean(dtype=jnp.float32) < GATHER_BELOW
  y_BxKxGxE = jax.lax.cond(
      few, _gathered, mix_all, query_BxKxGxE[..., split:], weights, kept,
      key2_BxKxSxU, value_BxKxSxE)
  return y_BxKxGxE.astype(query_BxKxGxE.dtype), kept.sum(-1)
