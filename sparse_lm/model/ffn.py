"""Feed-forward layers: plain, gated and Spark, with a sparsifier as a part."""

from flax import nnx
import jax
import jax.numpy as jnp

from sparse_lm.config import FFNConfig
from sparse_lm.model import sparsify
from sparse_lm.model.activations import ACTIVATIONS
from sparse_lm.model.layers import normal_param, project
from sparse_lm.model.sharding import constrain


def apply_sparsifier(x: jax.Array, config: FFNConfig) -> jax.Array:
  """The configured sparsifier over the neurons, x's last axis."""
  if config.sparsifier == "statistical_topk":
    return sparsify.statistical_topk(x, config.num_active,
                                     bessel=config.bessel,
                                     huber_delta=config.huber_delta)
  return x


class FFN(nnx.Module):
  """down(act(sparsify(gate x_gate)) * (up x_up)).

  | shape | x_gate    | x_up      |                                         |
  |-------|-----------|-----------|-----------------------------------------|
  | plain | x         | none: 1   | two matrices                            |
  | gated | x         | x         | three matrices (GLU, arXiv 2002.05202)  |
  | spark | x[..., :R]| x[..., R:]| two matrices' worth (arXiv 2506.06644,  |
  |       |           |           | Eq. 2: the gate is also the predictor)  |
  """

  def __init__(self, config: FFNConfig, model_dim: int, rngs: nnx.Rngs):
    gate_dim, up_dim = config.input_dims(model_dim)
    neurons = config.num_neurons
    self.config = config
    self.activation = ACTIVATIONS[config.activation]
    self.gate_DxF = normal_param(rngs, (gate_dim, neurons), gate_dim)
    if up_dim:
      self.up_DxF = normal_param(rngs, (up_dim, neurons), up_dim)
    self.down_FxD = normal_param(rngs, (neurons, model_dim), neurons)

  def hidden(self, x_BxLxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The intermediate output and the number of active neurons.

    Returns:
      h_BxLxF, and how many of each token's neurons have a non-zero activation
      (the gate's, before `up` multiplies it), an int32 array (B, L).
    """
    x_gate = x_up = x_BxLxD
    if self.config.shape == "spark":
      x_gate, x_up = jnp.split(x_BxLxD, [self.config.predictor_dim], axis=-1)
    gate_BxLxF = constrain(project(x_gate, self.gate_DxF[...]), "BxLxF")
    h_BxLxF = self.activation(apply_sparsifier(gate_BxLxF, self.config))
    active_BxL = jnp.count_nonzero(h_BxLxF, axis=-1).astype(jnp.int32)
    if self.config.shape != "plain":
      h_BxLxF = h_BxLxF * project(x_up, self.up_DxF[...])
    return h_BxLxF, active_BxL

  def __call__(self, x_BxLxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The layer's output (B, L, D) and its active neurons per token (B, L)."""
    h_BxLxF, active_BxL = self.hidden(x_BxLxD)
    return project(h_BxLxF, self.down_FxD[...]), active_BxL
