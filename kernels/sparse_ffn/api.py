"""One signature for every implementation of the sparse feed-forward layer."""

from collections.abc import Callable
import math

import jax

from sparse_lm.kernels.sparse_ffn import reference, xla
from sparse_lm.kernels.sparse_ffn.select import Activation, Select


def _pallas_tpu(*args) -> tuple[jax.Array, jax.Array]:
  # Pallas is imported where it is used alone.
  # pylint: disable-next=g-import-not-at-top
  from sparse_lm.kernels.sparse_ffn import tpu
  return tpu.sparse_ffn(*args)


# By name. `reference` is what the others are tested against.
IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla.sparse_ffn, "reference": reference.sparse_ffn,
    "pallas_tpu": _pallas_tpu}


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


def sparse_ffn(x_gate_BxR: jax.Array, x_up_BxU: jax.Array | None,
               gate_FxR: jax.Array, up_FxU: jax.Array | None,
               down_FxD: jax.Array, *, select: Select,
               up_activation: Activation = _linear,
               implementation: str = "xla") -> tuple[jax.Array, jax.Array]:
  """down' (select(gate x_gate) * up_activation(up x_up)), for a few tokens.

  The three matrices are neuron-major: a row a neuron. `gate` is read whole; of
  `up` and `down` only the rows of neurons that `select` leaves different from 0
  for some token, however many there are. Sums are in float32.

  Args:
    x_gate_BxR: what the gate reads, B tokens: Spark's first R dims, or all.
    x_up_BxU: what `up` reads; None in a plain layer.
    gate_FxR: the gate, or predictor.
    up_FxU: None in a plain layer. A `tpu.layout` for "pallas_tpu".
    down_FxD: as training has it. A `tpu.layout` for "pallas_tpu".
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
  neurons = gate_FxR.shape[0]
  expected = [("gate_FxR", gate_FxR, x_gate_BxR.shape[1]),
              ("down_FxD", down_FxD, math.prod(down_FxD.shape[1:]))]
  if up_FxU is not None:
    expected.append(("up_FxU", up_FxU, x_up_BxU.shape[1]))
  for name, array, width in expected:
    laid_out = implementation == "pallas_tpu" and array.ndim == 3
    found = ((array.shape[0], math.prod(array.shape[1:])) if laid_out
             else array.shape)
    if found != (neurons, width):
      raise ValueError(
          f"{name} has shape {array.shape}, expected {(neurons, width)}")
  return IMPLEMENTATIONS[implementation](
      x_gate_BxR, x_up_BxU, gate_FxR, up_FxU, down_FxD, select, up_activation)
