"""Feed-forward layers: plain, gated and Spark, with a sparsifier as a part."""

from flax import nnx
import jax
import jax.numpy as jnp

from sparse_lm.config import WITH_THRESHOLD, FFNConfig, LinearInputsConfig
from sparse_lm.kernels.gaussian import quantile
from sparse_lm.kernels.statistical_topk import gated_topk
from sparse_lm.model import sparsify
from sparse_lm.model.activations import make_activation
from sparse_lm.model.activity import COUNTS, Activity
from sparse_lm.model.layers import normal_param, project
from sparse_lm.model.sharding import constrain


def apply_sparsifier(x: jax.Array, config: FFNConfig) -> jax.Array:
  """The configured sparsifier over the neurons, x's last axis."""
  k = config.num_active
  if config.sparsifier == "statistical_topk":
    return sparsify.statistical_topk(x, k, bessel=config.bessel,
                                     huber_delta=config.huber_delta)
  if config.sparsifier == "topk":
    return sparsify.topk(x, k)
  if config.sparsifier == "approx_topk":
    return sparsify.approx_topk(x, k, config.recall)
  if config.sparsifier == "block_topk":
    kept = round(config.active_fraction * config.block_size)
    return sparsify.block_topk(x, kept, config.block_size)
  return x


def _apply_where(on: bool | jax.Array, x: jax.Array,
                 config: FFNConfig) -> jax.Array:
  """`apply_sparsifier` in the layers that have one."""
  if isinstance(on, bool):
    return apply_sparsifier(x, config) if on else x
  return jnp.where(on, apply_sparsifier(x, config), x)


class FFN(nnx.Module):
  """down(act(sparsify(gate x_gate)) * up_act(up x_up)).

  | shape | x_gate    | x_up      |                                         |
  |-------|-----------|-----------|-----------------------------------------|
  | plain | x         | none: 1   | two matrices                            |
  | gated | x         | x         | three matrices (GLU, arXiv 2002.05202)  |
  | spark | x[..., :R]| x[..., R:]| two matrices' worth (arXiv 2506.06644,  |
  |       |           |           | Eq. 2: the gate is also the predictor)  |
  """

  def __init__(self, config: FFNConfig, inputs: LinearInputsConfig,
               model_dim: int, rngs: nnx.Rngs):
    gate_dim, up_dim = config.input_dims(model_dim)
    neurons = config.num_neurons
    self.config, self.inputs = config, inputs
    self.activation = make_activation(config.activation, config.threshold)
    self.up_activation = make_activation(config.up_activation,
                                         config.threshold)
    self.gate_DxF = normal_param(rngs, (gate_dim, neurons), gate_dim)
    if up_dim:
      self.up_DxF = normal_param(rngs, (up_dim, neurons), up_dim)
    self.down_FxD = normal_param(rngs, (neurons, model_dim), neurons)

  def split_input(self, x_BxLxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the gate reads, and what `up` reads."""
    x_BxLxD = sparsify.sparsify_input(x_BxLxD, self.inputs)
    if self.config.shape == "spark":
      x_gate, x_up = jnp.split(x_BxLxD, [self.config.predictor_dim], axis=-1)
      return x_gate, x_up
    return x_BxLxD, x_BxLxD

  def project_gate(self, x_gate_BxLxD: jax.Array) -> jax.Array:
    """The scores (B, L, F): the gate, or predictor, before its activation."""
    return project(x_gate_BxLxD, self.gate_DxF[...])

  def project_up(self, x_up_BxLxD: jax.Array) -> jax.Array:
    """The branch without the gate (B, L, F), before its activation."""
    return project(x_up_BxLxD, self.up_DxF[...])

  def project_down(self, hidden_BxLxF: jax.Array) -> jax.Array:
    """The layer's output (B, L, D)."""
    return project(hidden_BxLxF, self.down_FxD[...])

  def hidden(self, x_BxLxD: jax.Array,
             sparse: bool | jax.Array = True) -> Activity:
    """Everything up to down's input, `Activity.hidden_BxLxF`.

    Args:
      x_BxLxD: the layer's input.
      sparse: whether the sparsifier is on; an array in a scan over layers.
    """
    x_gate, x_up = self.split_input(x_BxLxD)
    score_BxLxF = constrain(self.project_gate(x_gate), "BxLxF")
    up_BxLxF = None if self.config.shape == "plain" else self.project_up(x_up)
    # What is not measured of these the compiler leaves out.
    gate_BxLxF = _apply_where(sparse, score_BxLxF, self.config)
    activation_BxLxF = self.activation(gate_BxLxF)
    margin_BxLxF, counts = score_BxLxF, {}
    if self.config.activation in WITH_THRESHOLD:
      margin_BxLxF = score_BxLxF - self.config.threshold
    if self._in_one_pass(sparse):
      h_BxLxF, counts = self._gated_topk(score_BxLxF, up_BxLxF)
    else:
      h_BxLxF = activation_BxLxF
      if up_BxLxF is not None:
        h_BxLxF = h_BxLxF * self.up_activation(up_BxLxF)
      h_BxLxF = sparsify.sparsify_input(h_BxLxF, self.inputs)
    return Activity(gate_BxLxF, activation_BxLxF, h_BxLxF, margin_BxLxF, counts)

  def _in_one_pass(self, sparse: bool | jax.Array) -> bool:
    """Whether `gated_topk` stands between the matrices.

    It is the same function of the same arrays. On TPUs it would move more
    bytes: there XLA makes its parts parts of the matrix products.
    """
    config, mesh = self.config, jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device or jax.devices()[0]
    return (sparse is True and config.sparsifier == "statistical_topk"
            and config.huber_delta == 0
            and config.num_active < config.num_neurons
            and self.inputs.sparsifier == "none" and device.platform != "tpu")

  def _gated_topk(self, score_BxLxF: jax.Array, up_BxLxF: jax.Array | None
                  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`down`'s input, and what is counted on the way."""
    def rows(x):
      return x if x is None else x.reshape(-1, x.shape[-1])

    config, mesh = self.config, jax.sharding.get_abstract_mesh()
    h_NxF, *counts_N = gated_topk(
        rows(score_BxLxF), rows(up_BxLxF),
        quantile=quantile(config.num_active, config.num_neurons),
        activation=self.activation, up_activation=self.up_activation,
        bessel=config.bessel, return_counts=True,
        # The compiler does not split a kernel over devices.
        implementation=None if mesh.empty or mesh.size == 1 else "xla")
    counts = {name: x_N.reshape(score_BxLxF.shape[:2])
              for name, x_N in zip(COUNTS, counts_N, strict=True)}
    return h_NxF.reshape(score_BxLxF.shape), counts

  def __call__(self, x_BxLxD: jax.Array,
               sparse: bool | jax.Array = True) -> tuple[jax.Array, Activity]:
    """The layer's output (B, L, D), and what its neurons did."""
    activity = self.hidden(x_BxLxD, sparse)
    return self.project_down(activity.hidden_BxLxF), activity
