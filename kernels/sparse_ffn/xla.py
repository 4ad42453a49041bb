"""The operation in XLA: active rows are streamed, never gathered into a copy.

For each token a loop over its active neurons reads their rows of `up` and
`down` where they lie. Where so many are active that reading everything is
faster, it multiplies whole matrices instead; the result is the same.
"""

import jax
import jax.numpy as jnp

from sparse_lm.kernels.sparse_ffn.reference import product, split
from sparse_lm.kernels.sparse_ffn.select import Activation, Select

# Rows are streamed while all tokens' active neurons together are fewer than
# this fraction of the neurons. Found on 2 CPU cores: a row streamed takes as
# long as four in a product of whole matrices.
STREAM_BELOW = 0.25
# Rows in one turn of the loop: fewer turns, and their sums fuse.
_ROWS = 8


def _dense(activation_BxF, x_BxU, up_FxU, down_FxD, up_activation):
  hidden_BxF = activation_BxF
  if up_FxU is not None:
    hidden_BxF = hidden_BxF * up_activation(product(x_BxU, up_FxU))
  return jnp.dot(hidden_BxF.astype(down_FxD.dtype), down_FxD,
                 preferred_element_type=jnp.float32)


def _streamed(activation_F, x_U, up_FxU, down_FxD, up_activation):
  """One token's output (D,), its active rows of `down` added up."""
  count = jnp.count_nonzero(activation_F)
  rows_F = jnp.nonzero(activation_F, size=activation_F.size, fill_value=0)[0]

  def add(turn, y_1xD):
    for j in range(_ROWS):
      j += turn * _ROWS
      # Beyond the last one, that one again, times 0.
      i = rows_F[jnp.minimum(j, count - 1)]
      h = jnp.where(j < count, activation_F[i], 0)
      if up_FxU is not None:
        row_1xU = jax.lax.dynamic_slice_in_dim(up_FxU, i, 1)
        h *= up_activation((x_U * row_1xU).astype(jnp.float32).sum())
      row_1xD = jax.lax.dynamic_slice_in_dim(down_FxD, i, 1)
      y_1xD += h * row_1xD.astype(jnp.float32)
    return y_1xD

  zero_1xD = jnp.zeros((1, down_FxD.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, -(-count // _ROWS), add, zero_1xD)[0]


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
               up_activation: Activation) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_ffn`."""
  x_BxR, x_BxU = split(x_BxD, gate_FxR, up_FxU)
  activation_BxF = select(product(x_BxR, gate_FxR))
  active_B = jnp.count_nonzero(activation_BxF, axis=-1)

  def stream():
    return jax.lax.map(
        lambda token: _streamed(*token, up_FxU, down_FxD, up_activation),
        (activation_BxF, x_BxU))

  def multiply():
    return _dense(activation_BxF, x_BxU, up_FxU, down_FxD, up_activation)

  few = active_B.sum() < STREAM_BELOW * activation_BxF.shape[1]
  y_BxD = jax.lax.cond(few, stream, multiply)
  return y_BxD.astype(x_BxD.dtype), active_B
