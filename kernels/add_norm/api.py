"""One signature for every implementation of the sum and its norm."""

import jax

from sparse_lm.kernels.devices import is_hopper
from sparse_lm.kernels.implementations import Implementations, check_shapes

IMPLEMENTATIONS = Implementations("add_norm",
                                  {"xla": "xla", "pallas_gpu": "gpu"})


def unsupported(implementation: str, x_NxD: jax.Array) -> str | None:
  """Why an implementation cannot take such an array, None where it can."""
  return IMPLEMENTATIONS.unsupported(implementation, x_NxD)


def choose(device: jax.Device, x_NxD: jax.Array | jax.ShapeDtypeStruct) -> str:
  """The fastest implementation: the kernel for few tokens on Hopper."""
  few = is_hopper(device) and not unsupported("pallas_gpu", x_NxD)
  return "pallas_gpu" if few else "xla"


def add_norm(x_NxD: jax.Array, y_NxD: jax.Array, y_scale_D: jax.Array,
             scale_D: jax.Array, *, epsilon: float,
             implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
  """x + norm(y), and the norm of that.

  norm(y) = y / rms(y) * (1 + scale), in float32, and then in x's type.

  Args:
    x_NxD: the residual stream.
    y_NxD: what is added to it, in the same type.
    y_scale_D: of y's norm, float32.
    scale_D: of the sum's.
    epsilon: added to mean squares.
    implementation: of `IMPLEMENTATIONS`; None: the fastest.

  Returns:
    The sum and its norm, both (N, D) in x's type.

  Raises:
    ValueError: on an unknown implementation, one that cannot serve, or shapes
      that do not fit.
  """
  arrays = x_NxD, y_NxD, y_scale_D, scale_D
  return _checked(implementation, *arrays).add_norm(*arrays, epsilon)


def add_norm_and_project(
    x_NxD: jax.Array, y_NxD: jax.Array, y_scale_D: jax.Array,
    scale_D: jax.Array, rows_FxD: jax.Array, *, epsilon: float,
    implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
  """`add_norm`, and the norm's products with rows: where it can, one kernel.

  Args:
    x_NxD: as `add_norm` has it, like the next three.
    y_NxD: what is added.
    y_scale_D: of y's norm.
    scale_D: of the sum's.
    rows_FxD: a projection's, in the same type; as long as what it multiplies.
    epsilon: as `add_norm` has it.
    implementation: likewise.

  Returns:
    The sum (N, D), and the products (N, F) in x's type.

  Raises:
    ValueError: as `add_norm`.
  """
  arrays = x_NxD, y_NxD, y_scale_D, scale_D
  module = _checked(implementation, *arrays)
  takes_in = getattr(module, "takes_in_rows", None)
  if takes_in and takes_in(x_NxD, rows_FxD):
    return module.add_norm_and_project(*arrays, rows_FxD, epsilon)
  x_NxD, norm_NxD = module.add_norm(*arrays, epsilon)
  contract = ((1,), (1,)), ((), ())
  return x_NxD, jax.lax.dot_general(norm_NxD, rows_FxD, contract)


def _checked(implementation: str | None, x_NxD: jax.Array, y_NxD: jax.Array,
             y_scale_D: jax.Array, scale_D: jax.Array):
  """The implementation's module, if it can serve such arrays."""
  if (y_NxD.shape, y_NxD.dtype) != (x_NxD.shape, x_NxD.dtype):
    raise ValueError(f"y_NxD is {y_NxD.dtype}{list(y_NxD.shape)}, expected "
                     f"x_NxD's {x_NxD.dtype}{list(x_NxD.shape)}")
  check_shapes(("y_scale_D", y_scale_D, x_NxD.shape[1:]),
               ("scale_D", scale_D, x_NxD.shape[1:]))
  implementation = implementation or choose(jax.devices()[0], x_NxD)
  return IMPLEMENTATIONS.serving(implementation, x_NxD)
