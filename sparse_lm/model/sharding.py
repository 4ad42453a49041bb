"""Which mesh axis each axis of an array is split over.

An array's name ends in its axes, as in `query_DxHxE`, and that suffix is all
there is to know: the tables below send each letter to mesh axes.
"""

from collections.abc import Callable
import math

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
# D is the axis that fsdp gathers just before use; F, H, K and V stay split.
PARAMETER_AXES = {"D": "fsdp", "F": "tensor", "H": "tensor", "K": "tensor",
                  "V": "tensor"}
ACTIVATION_AXES = {"B": BATCH_AXES, "F": "tensor", "H": "tensor",
                   "K": "tensor", "V": "tensor"}
# Where the embedding (V, D) is used, fsdp does not split the batch, so that
# what travels is hidden states and never the whole embedding, far larger. At
# the lookup fsdp splits D, as it does the stored parameter; at the output
# logits, the vocabulary.
LOOKUP_AXES = {"B": "data", "V": "tensor", "D": "fsdp"}
LOGITS_AXES = {"B": "data", "V": ("fsdp", "tensor")}


def axes_of(path: tuple) -> list[str]:
  """["F", "D"] of a tree path that ends in "down_FxD"; [] without a suffix."""
  name = jax.tree_util.keystr(path[-1:], simple=True)
  return name.rsplit("_", 1)[1].split("x") if "_" in name else []


def parameter_spec(path: tuple, ndim: int) -> PartitionSpec:
  """The split of the parameter at a tree path, or of its optimizer state.

  Stacked layers add a leading axis N, which is never split. Vectors (norm
  scales) and scalars are whole on every device.
  """
  letters = axes_of(path)
  if len(letters) < 2:
    return PartitionSpec()
  axes = [PARAMETER_AXES.get(letter) for letter in letters]
  return PartitionSpec(*[None] * (ndim - len(axes)), *axes)


def per_batch_shard(f: Callable[[jax.Array], jax.Array],
                    x: jax.Array) -> jax.Array:
  """f(x) for an f that treats each row of x's first axis, B, by itself.

  The compiler gathers all rows on every device for operations that it cannot
  split, such as a sort; here each device runs f on its own. Where the rows do
  not divide among the devices, or without a mesh, it is f(x).
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if (
      not mesh.empty) else 1
  if shards == 1 or x.shape[0] % shards:
    return f(x)
  spec = PartitionSpec(BATCH_AXES)
  return jax.shard_map(f, in_specs=spec, out_specs=spec,
                       axis_names=set(BATCH_AXES))(x)


def constrain(x: jax.Array, axes: str,
              table: dict[str, str | tuple[str, ...]] = ACTIVATION_AXES
              ) -> jax.Array:
  """Asks for the split that `table` gives to `axes`, such as "BxLxD".

  Without a mesh (`jax.set_mesh`) it does nothing.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = PartitionSpec(*(table.get(a) for a in axes.split("x")))
  return jax.lax.with_sharding_constraint(x, spec)
