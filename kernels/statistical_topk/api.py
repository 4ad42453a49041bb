"""One signature for every implementation of the gated top-k."""

import functools
from types import ModuleType

import jax

from sparse_lm.kernels import devices
from sparse_lm.kernels.statistical_topk import gpu, xla
from sparse_lm.kernels.statistical_topk.rule import Activation, Rule

# Modules with `forward` and `backward`, by name.
IMPLEMENTATIONS: dict[str, ModuleType] = {"xla": xla, "pallas_gpu": gpu}


def _linear(x: jax.Array) -> jax.Array:
  return x


def choose(score_NxF: jax.Array, up_NxF: jax.Array | None, *,
           activation: Activation, up_activation: Activation = _linear) -> str:
  """The fastest implementation here of a `gated_topk` of these.

  Returns:
    A key of `IMPLEMENTATIONS`.
  """
  served = (devices.generation(jax.devices()[0]) >= 9  # Hopper
            and not gpu.unsupported(score_NxF, up_NxF, activation,
                                    up_activation))
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
    implementation: a key of `IMPLEMENTATIONS`; None: `choose`'s. "pallas_gpu"
      is of one device's rows: on a mesh it needs `jax.shard_map`.
    return_counts: also count what is not 0, which takes no further pass.

  Returns:
    An array of score's shape and type. With `return_counts` also, for each row
    (N,), how many activations of it are not 0, and how many of the results.

  Raises:
    ValueError: on an unknown implementation, or one that cannot serve these.
  """
  if implementation is None:
    implementation = choose(score_NxF, up_NxF, activation=activation,
                            up_activation=up_activation)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is not one of "
                     f"{', '.join(IMPLEMENTATIONS)}")
  if implementation == "pallas_gpu":
    reason = gpu.unsupported(score_NxF, up_NxF, activation, up_activation)
    if reason:
      raise ValueError(f"implementation='pallas_gpu' {reason}")
  rule = Rule(float(quantile), activation, up_activation, bessel)
  outs = _gated_topk(implementation, rule, score_NxF, up_NxF)
  return outs if return_counts else outs[0]
