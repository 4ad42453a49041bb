"""The compiled training step: shapes, shardings, lowering.

Everything here works on shapes alone, so the same program can be compiled for
the devices at hand (training/loop.py) or for a pod that is elsewhere
(training/aot.py).
"""

import functools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import Config
from sparse_lm.model.sharding import BATCH_AXES
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training import schedules
from sparse_lm.training.optimizer import make_optimizer
from sparse_lm.training.step import TrainState, init_state, make_train_step


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Shapes, types and shardings of the training state."""
  shapes = jax.eval_shape(functools.partial(
      init_state, config, make_optimizer(config.training)))
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, mesh_lib.shardings(mesh, shapes))


def create_state(config: Config, mesh: Mesh) -> TrainState:
  """A fresh training state, each device creating its own shards."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
  create = functools.partial(init_state, config,
                             make_optimizer(config.training))
  with jax.set_mesh(mesh):
    return jax.jit(create, out_shardings=shardings)()


def abstract_batch(config: Config, mesh: Mesh) -> dict:
  """Shapes, types and shardings of a global batch of data/pipeline.py."""
  shape = (config.training.batch_size, config.model.context_length)
  rows = functools.partial(
      jax.ShapeDtypeStruct, shape,
      sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
  batch = {name: rows(jnp.int32) for name in (
      "tokens_BxL", "targets_BxL", "segment_ids_BxL", "positions_BxL")}
  return dict(batch, weights_BxL=rows(jnp.float32))


def lower_train_step(config: Config, mesh: Mesh,
                     text_bytes_V: np.ndarray) -> jax.stages.Lowered:
  """`(state, batch) -> (state, metrics)`, the state donated, for a mesh."""
  training = config.training
  state = abstract_state(config, mesh)
  step = make_train_step(
      config, make_optimizer(training),
      schedules.learning_rate(training.optimizer, training.num_steps),
      text_bytes_V)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(
      jax.tree.map(lambda x: x.sharding, state),
      NamedSharding(mesh, PartitionSpec())))
  with jax.set_mesh(mesh):
    return jitted.lower(state, abstract_batch(config, mesh))
