"""One signature for every implementation of the sum and its norm."""

import jax

from sparse_lm.kernels import devices
from sparse_lm.kernels.implementations import loader

# By name, the module that has it.
IMPLEMENTATIONS: dict[str, str] = {"xla": "xla", "pallas_gpu": "gpu"}
_module = loader("add_norm", IMPLEMENTATIONS)


def unsupported(implementation: str, x_NxD: jax.Array) -> str | None:
  """Why an implementation cannot take such an array, None where it can."""
  check = getattr(_module(implementation), "unsupported", None)
  return check and check(x_NxD)


def choose(device: jax.Device, x_NxD: jax.Array | jax.ShapeDtypeStruct) -> str:
  """The fastest implementation: the kernel for few tokens on Hopper."""
  few = devices.generation(device) == 9 and not unsupported("pallas_gpu", x_NxD)
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
    implementation: a key of `IMPLEMENTATIONS`; None: the fastest.

  Returns:
    The sum and its norm, both (N, D) in x's type.

  Raises:
    ValueError: where the implementation that was asked for cannot serve.
  """
  implementation = implementation or choose(jax.devices()[0], x_NxD)
  reason = unsupported(implementation, x_NxD)
  if reason:
    raise ValueError(f"implementation={implementation!r}: {reason}")
  return _module(implementation).add_norm(x_NxD, y_NxD, y_scale_D, scale_D,
                                          epsilon)
