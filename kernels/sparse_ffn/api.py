"""One signature for every implementation of the sparse feed-forward layer."""

import math

import jax

from sparse_lm.kernels.add_norm import add_norm
from sparse_lm.kernels.devices import is_hopper
from sparse_lm.kernels.implementations import Implementations
from sparse_lm.kernels.sparse_ffn.select import Activation, Select, linear

# `reference` is what the others are tested against.
IMPLEMENTATIONS = Implementations("sparse_ffn", {
    "xla": "xla", "pallas_gpu": "gpu", "pallas_tpu": "tpu",
    "reference": "reference"})


def unsupported(implementation: str, x_BxD: jax.Array, gate_FxR: jax.Array,
                up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
                up_activation: Activation = linear) -> str | None:
  """Why an implementation cannot take such arguments, None where it can.

  Args:
    implementation: of `IMPLEMENTATIONS`.
    x_BxD: as `sparse_ffn` has it, like the others; or a
      `jax.ShapeDtypeStruct`.
    gate_FxR: the gate.
    up_FxU: None in a plain layer.
    down_FxD: the last matrix.
    select: from scores to activations.
    up_activation: of the other branch.

  Raises:
    ValueError: on an unknown implementation.
  """
  return IMPLEMENTATIONS.unsupported(implementation, x_BxD, gate_FxR, up_FxU,
                                     down_FxD, select, up_activation)


def _fastest(device: jax.Device) -> str | None:
  """Of a device, whatever the shapes.

  Not "pallas_tpu": it has been compiled, but not yet timed on a TPU.
  """
  if device.platform == "cpu":
    return "xla"
  return "pallas_gpu" if is_hopper(device) else None


def choose(device: jax.Device, x_BxD: jax.Array, gate_FxR: jax.Array,
           up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
           up_activation: Activation = linear) -> str | None:
  """The implementation that is faster than computing every neuron.

  Args:
    device: what it would run on.
    x_BxD: as for `unsupported`, like the others.
    gate_FxR: the gate.
    up_FxU: None in a plain layer.
    down_FxD: the last matrix.
    select: from scores to activations.
    up_activation: of the other branch.

  Returns:
    One of `IMPLEMENTATIONS`; None where there is none.
  """
  implementation = _fastest(device)
  if implementation is None or unsupported(
      implementation, x_BxD, gate_FxR, up_FxU, down_FxD, select, up_activation):
    return None
  return implementation


def layout(rows_FxD: jax.Array, implementation: str) -> jax.Array:
  """`up` or `down` as an implementation stores it: once, at load."""
  module = IMPLEMENTATIONS[implementation]
  return module.layout(rows_FxD) if hasattr(module, "layout") else rows_FxD


def sparse_ffn(x_BxD: jax.Array, gate_FxR: jax.Array,
               up_FxU: jax.Array | None, down_FxD: jax.Array, *,
               select: Select, up_activation: Activation = linear,
               implementation: str | None = None
               ) -> tuple[jax.Array, jax.Array]:
  """down' (select(gate x_first) * up_activation(up x_last)), for a few tokens.

  The three matrices are neuron-major: a row a neuron. `gate` multiplies the
  first R of x's dims, `up` its last U: in a Spark layer R + U = D, in a gated
  one R = U = D. `gate` is read whole; of `up` and `down` only the rows of
  neurons that `select` leaves different from 0 for some token, however many
  there are; but all rows by "xla" where many are active, and by "pallas_gpu"
  of more than 8 tokens. Sums are in float32.

  Args:
    x_BxD: the layer's input, B tokens.
    gate_FxR: the gate, or predictor.
    up_FxU: None in a plain layer; or its `layout`.
    down_FxD: as training has it; or its `layout`.
    select: from scores (B, F) in float32 to activations, exactly 0 where
      inactive: threshold and activation function. See `select.py`.
    up_activation: of the other branch, elementwise.
    implementation: of `IMPLEMENTATIONS`; None: what `choose` says of the first
      device, or "reference", which computes every neuron.

  Returns:
    The layer's output (B, D) in x's type, and how many neurons each token
    activates (B,), int32.

  Raises:
    ValueError: on an unknown implementation, one that cannot serve, or shapes
      that do not fit.
  """
  arguments = (x_BxD, gate_FxR, up_FxU, down_FxD, select, up_activation)
  return _checked(implementation, *arguments).sparse_ffn(*arguments)


def add_norm_and_sparse_ffn(
    x_BxD: jax.Array, y_BxD: jax.Array, y_scale_D: jax.Array,
    scale_D: jax.Array, gate_FxR: jax.Array, up_FxU: jax.Array | None,
    down_FxD: jax.Array, *, epsilon: float, select: Select,
    up_activation: Activation = linear, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`add_norm`, and `sparse_ffn` of the norm: where it can, in a kernel less.

  Args:
    x_BxD: the residual stream, like the next three as `add_norm` has them.
    y_BxD: what is added to it.
    y_scale_D: of y's norm.
    scale_D: of the sum's.
    gate_FxR: as `sparse_ffn` has it, like what follows.
    up_FxU: None in a plain layer; or its `layout`.
    down_FxD: as training has it; or its `layout`.
    epsilon: as `add_norm` has it.
    select: as `sparse_ffn` has it, like what follows.
    up_activation: of the other branch.
    implementation: of `sparse_ffn`.

  Returns:
    x + norm(y), and what `sparse_ffn` returns.

  Raises:
    ValueError: as `sparse_ffn`.
  """
  tokens = x_BxD, y_BxD, y_scale_D, scale_D
  layer = gate_FxR, up_FxU, down_FxD, select, up_activation
  module = _checked(implementation, x_BxD, *layer)
  takes_in = getattr(module, "takes_in_add_norm", None)
  if takes_in and takes_in(x_BxD, gate_FxR, select):
    return module.add_norm_and_sparse_ffn(*tokens, epsilon, *layer)
  x_BxD, norm_BxD = add_norm(*tokens, epsilon=epsilon)
  return x_BxD, *module.sparse_ffn(norm_BxD, *layer)


def _checked(implementation: str | None, x_BxD: jax.Array, gate_FxR: jax.Array,
             up_FxU: jax.Array | None, down_FxD: jax.Array, select: Select,
             up_activation: Activation):
  """The implementation's module, if it can serve such arguments."""
  arguments = (x_BxD, gate_FxR, up_FxU, down_FxD, select, up_activation)
  if implementation is None:
    implementation = choose(jax.devices()[0], *arguments) or "reference"
  neurons, width = gate_FxR.shape[0], x_BxD.shape[1]
  expected = [("gate_FxR", gate_FxR, min(gate_FxR.shape[1], width)),
              ("down_FxD", down_FxD, width)]
  if up_FxU is not None:
    columns = math.prod(up_FxU.shape[1:])
    expected.append(("up_FxU", up_FxU, min(columns, width)))
  for name, array, columns in expected:
    shape = (neurons, columns)
    if array.shape != shape and (
        array is gate_FxR or implementation != "pallas_tpu"
        or (array.shape[0], math.prod(array.shape[1:])) != shape):
      raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
  return IMPLEMENTATIONS.serving(implementation, *arguments)
