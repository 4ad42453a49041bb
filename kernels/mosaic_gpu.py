"""What differs between the versions of Pallas Mosaic GPU that are supported."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Layouts are chosen here and not inferred, and barriers stand where they must.
PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True)


def load(ref, layout, *, optimized: bool = True) -> jax.Array:
  """`ref`'s array in a layout.

  Args:
    ref: in shared or global memory.
    layout: how threads share the array.
    optimized: False for any pattern of access, global memory's for one.
  """
  index = () if jax.__version_info__ >= (0, 11) else ((),)
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store(ref, value: jax.Array) -> None:
  """Writes an array to `ref`, in global memory, by any pattern of access."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
