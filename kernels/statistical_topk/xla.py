"""`gated_topk` in plain JAX: the fallback, and what the others must equal."""

import jax
import jax.numpy as jnp

from sparse_lm.kernels.statistical_topk.rule import Rule


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _gate(rule: Rule, score_NxF, mean_N, std_N):
  """act(y) and a function from its gradient to y's."""
  theta_N = rule.theta(mean_N, std_N)
  over_NxF = _wide(score_NxF) - theta_N[:, None]
  gate_NxF, pull = jax.vjp(rule.activation, jnp.maximum(over_NxF, 0))
  return gate_NxF, lambda g: jnp.where(over_NxF > 0, pull(g)[0], 0)


def forward(rule: Rule, score_NxF: jax.Array, up_NxF: jax.Array | None
            ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """h (N, F); of each row (N,): the scores' mean and std, and two counts.

  How many activations are not 0, and how many entries of h, in float32.
  """
  wide_NxF, count = _wide(score_NxF), score_NxF.shape[1]
  # About the row's first entry, since squares about 0 would leave few digits
  # of the variance where the mean is far from it; and both sums in one pass.
  pivot_Nx1 = wide_NxF[:, :1]
  off_NxF = wide_NxF - pivot_Nx1
  mean_N = off_NxF.sum(1) / count
  squares_N = jnp.square(off_NxF).sum(1) - count * jnp.square(mean_N)
  std_N = rule.deviation(jnp.maximum(squares_N, 0), count)
  mean_N += pivot_Nx1[:, 0]
  h_NxF, _ = _gate(rule, score_NxF, mean_N, std_N)
  active_N = (h_NxF != 0).sum(1, dtype=jnp.float32)
  if up_NxF is not None:
    h_NxF *= rule.up_activation(_wide(up_NxF))
  nonzero_N = (h_NxF != 0).sum(1, dtype=jnp.float32)
  return h_NxF.astype(score_NxF.dtype), mean_N, std_N, active_N, nonzero_N


def backward(rule: Rule, score_NxF: jax.Array, up_NxF: jax.Array | None,
             mean_N: jax.Array, std_N: jax.Array, d_h_NxF: jax.Array
             ) -> tuple[jax.Array, jax.Array | None]:
  """The gradients of score and up, of h's."""
  count = score_NxF.shape[1]
  arrays = score_NxF, up_NxF, d_h_NxF

  def gradients(score_NxF, up_NxF, d_h_NxF):
    """Of the score with theta fixed, and of up, both wide."""
    gate_NxF, pull = _gate(rule, score_NxF, mean_N, std_N)
    d_gate_NxF, d_up_NxF = _wide(d_h_NxF), None
    if up_NxF is not None:
      branch_NxF, pull_up = jax.vjp(rule.up_activation, _wide(up_NxF))
      d_up_NxF = pull_up(d_gate_NxF * gate_NxF)[0]
      d_gate_NxF *= branch_NxF
    return pull(d_gate_NxF), d_up_NxF

  # Behind a barrier: where XLA sees one expression twice, here in the forward
  # pass, the sum and the result, it stores tanh and the like, in float32. To
  # read the arguments again and compute it anew is faster.
  arrays = jax.lax.optimization_barrier(arrays)
  total_N = gradients(*arrays)[0].sum(1)
  arrays, total_N = jax.lax.optimization_barrier((arrays, total_N))
  passed_NxF, d_up_NxF = gradients(*arrays)
  off_NxF = _wide(arrays[0]) - mean_N[:, None]
  d_theta_NxF = 1 / count + rule.slope(std_N, count)[:, None] * off_NxF
  d_score_NxF = passed_NxF - total_N[:, None] * d_theta_NxF
  return (d_score_NxF.astype(score_NxF.dtype),
          None if up_NxF is None else d_up_NxF.astype(up_NxF.dtype))
