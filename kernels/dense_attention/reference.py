"""The operation in plain jax.numpy, in float32."""

import jax
import jax.numpy as jnp

from sparse_lm.kernels.newest_token import write_newest
from sparse_lm.kernels.sparse_attention.predictor import (products, softmax,
                                                          visible)


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key_BxKxSxE: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int,
                     logit_softcap: float
                     ) -> tuple[jax.Array, list[jax.Array]]:
  """As `api.write_and_attend`."""
  query_BxKxGxE, caches = write_newest(rows_BxRxE, rotary_Bx2xT,
                                       [key_BxKxSxE], value_BxKxSxE, lengths_B)
  key_BxKxSxE, value_BxKxSxE = caches
  seen_BxS = visible(lengths_B, window, key_BxKxSxE.shape[2])
  weights_BxKxGxS = softmax(products(query_BxKxGxE, key_BxKxSxE),
                            seen_BxS[:, None, None], logit_softcap)
  # What stands in a slot that is not seen must not matter, NaN included.
  value_BxKxSxE = jnp.where(seen_BxS[:, None, :, None], value_BxKxSxE, 0)
  y_BxKxGxE = jnp.einsum("bkgs,bkse->bkge", weights_BxKxGxS, value_BxKxSxE,
                         preferred_element_type=jnp.float32)
  return y_BxKxGxE.astype(query_BxKxGxE.dtype), caches
