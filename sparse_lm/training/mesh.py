"""Devices: joining a cluster, arranging a mesh, placing arrays on it."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from sparse_lm.config import Config, MeshConfig
from sparse_lm.errors import UserError
from sparse_lm.model.sharding import BATCH_AXES, parameter_spec

AXES = ("data", "fsdp", "tensor")


def join_cluster(config: MeshConfig) -> None:
  """Calls `jax.distributed.initialize` where a cluster is there or asked for.

  Call it before anything touches a device.
  """
  if config.distributed == "off" or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize()
  except ValueError as e:  # No cluster was detected.
    if config.distributed == "on":
      raise UserError("config.training.mesh.distributed: no cluster was "
                      f"detected ({str(e).splitlines()[0]})") from e


def make_mesh(config: Config,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of `devices` (None: all), with axes data, fsdp and tensor.

  Raises:
    UserError: where the mesh does not fit the devices or the model.
  """
  shape = config.training.mesh
  devices = jax.devices() if devices is None else devices
  rest = shape.fsdp * shape.tensor
  data = len(devices) // rest if shape.data == -1 else shape.data
  if data * rest != len(devices):
    raise UserError(
        f"config.training.mesh: data={shape.data} x fsdp={shape.fsdp} x "
        f"tensor={shape.tensor} does not fit {len(devices)} device(s)")
  model, training = config.model, config.training
  micro_batch = training.batch_size // training.micro_batches
  for key, size, parts, axis in (
      ("training.batch_size", micro_batch, data * shape.fsdp, "data x fsdp"),
      ("model.model_dim", model.model_dim, shape.fsdp, "fsdp"),
      ("model.ffn.predictor_dim",
       model.ffn.predictor_dim if model.ffn.shape == "spark" else 0,
       shape.fsdp, "fsdp"),
      ("model.ffn.num_neurons", model.ffn.num_neurons, shape.tensor, "tensor"),
      ("model.attention.num_kv_heads", model.attention.num_kv_heads,
       shape.tensor, "tensor"),
      ("model.vocab_size", model.vocab_size, rest, "fsdp x tensor")):
    if size % parts:
      raise UserError(f"config.{key}: {size} is not divisible by the mesh's "
                      f"{axis}={parts}")
  return jax.make_mesh((data, shape.fsdp, shape.tensor), AXES,
                       axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(mesh: Mesh, tree):
  """A sharding for each leaf, by the axes in its name."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: NamedSharding(mesh, parameter_spec(path, x.ndim)), tree)


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict:
  """This process's rows, as its part of arrays that span all processes."""
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  return {name: jax.make_array_from_process_local_data(sharding, rows)
          for name, rows in batch.items()}
