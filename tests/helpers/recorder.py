"""A sampler for tests: what a decoder computes, whatever it draws."""

import jax
import jax.numpy as jnp
import numpy as np


class Recorder:
  """Draws any token, by the key alone, and keeps the logits.

  So decoders with the same key read the same tokens, one after another quite
  different ones, and their logits can be compared at each.
  """

  def __init__(self):
    self._logits = []

  def __call__(self, logits_BxV: jax.Array, key: jax.Array) -> jax.Array:
    jax.debug.callback(lambda x: self._logits.append(np.asarray(x, np.float32)),
                       logits_BxV, ordered=True)
    batch, vocab_size = logits_BxV.shape
    return jax.random.randint(key, (batch,), 0, vocab_size, jnp.int32)

  @property
  def logits_TxBxV(self) -> np.ndarray:
    """In the order of the draws; one for each chunk of the prompt."""
    jax.effects_barrier()
    return np.array(self._logits)
