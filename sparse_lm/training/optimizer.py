"""The optimizer: clipped AdamW, decay on matrices alone."""

import jax
import optax

from sparse_lm.config import TrainingConfig
from sparse_lm.model.sharding import axes_of
from sparse_lm.training import schedules


def decay_mask(params):
  """True for matrices, False for vectors such as norm scales.

  By name, since a stacked vector has two axes like a matrix.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, _: len(axes_of(path)) > 1, params)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
  """AdamW as configured, after clipping by the global norm."""
  opt = config.optimizer
  adamw = optax.adamw(
      schedules.learning_rate(opt, config.num_steps),
      b1=opt.beta1, b2=opt.beta2, eps=opt.epsilon,
      weight_decay=opt.weight_decay, mask=decay_mask)
  if not opt.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(opt.clip_norm), adamw)
