"""The loss, as sums over tokens."""

import jax
import jax.numpy as jnp

from sparse_lm.model import Transformer


def _sums(model: Transformer, embedding_VxD: jax.Array, x_BxLxD: jax.Array,
          targets_BxL: jax.Array,
          weights_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy in nats, and log(Z)^2, summed with the weights."""
  logits_BxLxV = model.unembed(x_BxLxD, embedding_VxD)
  log_z_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
  chosen_BxL = jnp.take_along_axis(
      logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]
  return (((log_z_BxL - chosen_BxL) * weights_BxL).sum(),
          (jnp.square(log_z_BxL) * weights_BxL).sum())


def loss_sums(model: Transformer, x_BxLxD: jax.Array, targets_BxL: jax.Array,
              weights_BxL: jax.Array,
              chunk: int) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy and z-loss (PaLM, arXiv 2204.02311, Section 5) as sums.

  Args:
    model: gives the output embedding.
    x_BxLxD: final hidden states.
    targets_BxL: the tokens to predict.
    weights_BxL: 1 where a prediction counts, else 0.
    chunk: positions whose logits are alive at a time; 0: all. With a large
      vocabulary the logits are the largest array of a training step.
  """
  embedding_VxD = model.output_embedding()
  if not chunk or chunk == x_BxLxD.shape[1]:
    return _sums(model, embedding_VxD, x_BxLxD, targets_BxL, weights_BxL)

  def split(x):
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

  parts = jax.tree.map(split, (x_BxLxD, targets_BxL, weights_BxL))
  sums = jax.lax.map(
      jax.checkpoint(lambda part: _sums(model, embedding_VxD, *part)), parts)
  return jax.tree.map(lambda s: s.sum(), sums)
