"""One signature for every implementation of the gated top-k."""

import functools

import jax

from sparse_lm.kernels.devices import is_hopper
from sparse_lm.kernels.implementations import Implementations, check_shapes
from sparse_lm.kernels.statistical_topk.rule import Activation, Rule

# Each has `forward` and `backward`.
IMPLEMENTATIONS = Implementations("statistical_topk",
                                  {"xla": "xla", "pallas_gpu": "gpu"})


def _linear(x: jax.Array) -> jax.Array:
  return x


def unsupported(implementation: str, score_NxF: jax.Array,
                up_NxF: jax.Array | None, activation: Activation,
                up_activation: Activation = _linear) -> str | None:
  """Why an implementation cannot take such arguments, None where it can.

  Args:
    implementation: of `IMPLEMENTATIONS`.
    score_NxF: as `gated_topk` has it, like the others; or a
      `jax.ShapeDtypeStruct`.
    up_NxF: the other branch.
    activation: of the gate.
    up_activation: of the other branch.

  Raises:
    ValueError: on an unknown implementation.
  """
  return IMPLEMENTATIONS.unsupported(implementation, score_NxF, up_NxF,
                                     activation, up_activation)


def choose(device: jax.Device, score_NxF: jax.Array, up_NxF: jax.Array | None,
           activation: Activation, up_activation: Activation = _linear) -> str:
  """The fastest implementation: the kernel on Hopper, where it serves.

  Args:
    device: what it would run on.
    score_NxF: as for `unsupported`, like the others.
    up_NxF: the other branch.
    activation: of the gate.
    up_activation: of the other branch.

  Returns:
    One of `IMPLEMENTATIONS`.
  """
  served = is_hopper(device) and not unsupported(
      "pallas_gpu", score_NxF, up_NxF, activation, up_activation)
  return "pallas_gpu" if served else "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_topk(implementation, rule, score_NxF, up_NxF):
  return _forward(implementation, rule, score_NxF, up_NxF)[0]


def _forward(implementation, rule, score_NxF, up_NxF):
  h_NxF, mean_N, std_N, *counts = IMPLEMENTATIONS[implementation].forward(
      rule, score_NxF, up_NxF)
  return (h_NxF, *counts), (score_NxF, up_NxF, mean_N, std_N)


def _backward(implementation, rule, residuals, gradients):
  d_h_NxF, *_ = gradients  # Counts have none.
  return IMPLEMENTATIONS[implementation].backward(rule, *residuals, d_h_NxF)


_gated_topk.defvjp(_forward, _backward)


def gated_topk(score_NxF: jax.Array, up_NxF: jax.Array | None, *,
               quantile: float, activation: Activation,
               up_activation: Activation = _linear, bessel: bool = False,
               implementation: str | None = None, return_counts: bool = False
               ) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
  """activation(max(score - theta, 0)) * up_activation(up), by rows.

  theta = mean + quantile * std of the row's scores: statistical top-k, and all
  that stands between a gated layer's first matrices and its last. Forward it
  reads score and up once and writes the result; backward it reads score, up
  and the result's gradient once and writes two gradients. What it stores for
  the backward pass, besides score and up, is two numbers a row.

  Args:
    score_NxF: the gate, any float type. Sums are in float32 or wider.
    up_NxF: the other branch, of the same type; None where there is none.
    quantile: of N(0, 1), at the fraction of a row that is to be cut.
    activation: elementwise; its derivative is JAX's.
    up_activation: of the other branch, elementwise.
    bessel: divide the variance by F - 1, not by F.
    implementation: of `IMPLEMENTATIONS`; None: what `choose` says of the first
      device. "pallas_gpu" is of one device's rows: on a mesh it needs
      `jax.shard_map`.
    return_counts: also count what is not 0, which takes no further pass.

  Returns:
    An array of score's shape and type. With `return_counts` also, for each row
    (N,), how many activations of it are not 0, and how many of the results.

  Raises:
    ValueError: on an unknown implementation, one that cannot serve these, or
      shapes that do not fit.
  """
  if up_NxF is not None:
    check_shapes(("up_NxF", up_NxF, score_NxF.shape))
  arguments = score_NxF, up_NxF, activation, up_activation
  implementation = implementation or choose(jax.devices()[0], *arguments)
  IMPLEMENTATIONS.serving(implementation, *arguments)
  rule = Rule(float(quantile), activation, up_activation, bessel)
  outs = _gated_topk(implementation, rule, score_NxF, up_NxF)
  return outs if return_counts else outs[0]
