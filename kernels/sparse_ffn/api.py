"""One signature for every implementation of the sparse feed-forward layer."""

from collections.abc import Callable

import jax

from sparse_lm.kernels.sparse_ffn import reference, xla
from sparse_lm.kernels.sparse_ffn.select import Activation, Select

# By name. `reference` is what the others are tested against.
IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla.sparse_ffn, "reference": reference.sparse_ffn}


def choose(platform: str) -> str | None:
  """The implementation that is faster than computing every neuron.

  Args:
    platform: as `jax.Device.platform` has it.

  Returns:
    A key of `IMPLEMENTATIONS`; None where there is none yet. On a GPU or TPU
    the loop over rows would start a program for each of them.
  """
  return "xla" if platform == "cpu" else None


def _linear(x: jax.Array) -> jax.Array:
  return x


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, *,
               select: Select,
               up_activation: Activation = _linear,
               implementation: str = "xla") -> tuple[jax.Array, jax.Array]:
  """down' (select(gate x_first) * up_activation(up x_last)), for a few tokens.

  The three matrices are neuron-major: a row a neuron. `gate` multiplies the
  first R of x's dims, `up` its last U: in a Spark layer R + U = D, in a gated
  one R = U = D. `gate` is read whole; of `up` and `down` only the rows of
  neurons that `select` leaves different from 0 for some token, however many
  there are. Sums are in float32.

  Args:
    x_BxD: the layer's input, B tokens.
    gate_FxR: the gate, or predictor.
    up_FxU: None in a plain layer.
    down_FxD: as training has it.
    select: from scores (B, F) in float32 to activations, exactly 0 where
      inactive: threshold and activation function. See `select.py`.
    up_activation: of the other branch, elementwise.
    implementation: a key of `IMPLEMENTATIONS`.

  Returns:
    The layer's output (B, D) in x's type, and how many neurons each token
    activates (B,), int32.

  Raises:
    ValueError: on an unknown implementation, or shapes that do not fit.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is not one of "
                     f"{', '.join(IMPLEMENTATIONS)}")
  neurons, width = gate_FxR.shape[0], x_BxD.shape[1]
  expected = [("gate_FxR", gate_FxR, min(gate_FxR.shape[1], width)),
              ("down_FxD", down_FxD, width)]
  if up_FxU is not None:
    expected.append(("up_FxU", up_FxU, min(up_FxU.shape[1], width)))
  for name, array, columns in expected:
    if array.shape != (neurons, columns):
      raise ValueError(f"{name} has shape {array.shape}, expected "
                       f"{(neurons, columns)}")
  return IMPLEMENTATIONS[implementation](
      x_BxD, gate_FxR, up_FxU, down_FxD, select, up_activation)
