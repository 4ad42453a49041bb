"""Feed-forward layers laid out for decoding."""

from flax import nnx
import jax
import scipy.special

from sparse_lm.config import RELU_FAMILY
from sparse_lm.kernels.sparse_ffn import (Elementwise, Select,
                                          StatisticalTopk, sparse_ffn)
from sparse_lm.model.activity import ActiveCount, Activity
from sparse_lm.model.ffn import FFN, apply_sparsifier


def can_skip(ffn: FFN, sparse: bool) -> bool:
  """Whether inactive neurons are there to skip.

  That is, whether a sparsifier or a ReLU makes activations exactly 0. Layers
  that sparsify the inputs of linear maps (Q-Sparse) are computed whole.

  Args:
    ffn: the layer.
    sparse: whether its sparsifier is on.
  """
  sparsified = sparse and ffn.config.sparsifier != "none"
  return ffn.inputs.sparsifier == "none" and (
      sparsified or ffn.config.activation in RELU_FAMILY)


def _project_rows(x_BxLxD: jax.Array, rows_FxD: jax.Array) -> jax.Array:
  return jax.lax.dot_general(x_BxLxD, rows_FxD, (((2,), (1,)), ((), ())))


def make_select(ffn: FFN, sparse: bool) -> Select:
  """How a layer makes activations of scores, for the kernel."""
  config = ffn.config
  if not sparse or config.sparsifier == "none":
    return Elementwise(ffn.activation)
  k, neurons = config.num_active, config.num_neurons
  if (config.sparsifier == "statistical_topk" and not config.huber_delta
      and k < neurons):
    return StatisticalTopk(float(scipy.special.ndtri(1 - k / neurons)),
                           ffn.activation, config.bessel)
  return lambda score_BxF: ffn.activation(apply_sparsifier(score_BxF, config))


class NeuronMajorFFN(FFN):
  """An FFN whose `gate` and `up` have a row a neuron, as `down` has.

  One token a row of the batch reads the rows of active neurons alone, by
  `sparse_lm.kernels.sparse_ffn`; a prompt, of many tokens, reads everything.
  """

  def __init__(self, ffn: FFN, sparse: bool, implementation: str):
    """Takes over the parameters of `ffn`.

    Args:
      ffn: the layer as training has it; `can_skip` must hold.
      sparse: whether its sparsifier is on.
      implementation: of the kernel.
    """
    self.config, self.inputs = ffn.config, ffn.inputs
    self.activation, self.up_activation = ffn.activation, ffn.up_activation
    self.implementation = implementation
    self.select = make_select(ffn, sparse)
    self.gate_FxD, self.down_FxD = nnx.Param(ffn.gate_DxF[...].T), ffn.down_FxD
    if self.config.shape != "plain":
      self.up_FxD = nnx.Param(ffn.up_DxF[...].T)

  def project_gate(self, x_gate_BxLxD: jax.Array) -> jax.Array:
    return _project_rows(x_gate_BxLxD, self.gate_FxD[...])

  def project_up(self, x_up_BxLxD: jax.Array) -> jax.Array:
    return _project_rows(x_up_BxLxD, self.up_FxD[...])

  def __call__(self, x_BxLxD: jax.Array, sparse: bool | jax.Array = True
               ) -> tuple[jax.Array, Activity | ActiveCount]:
    if x_BxLxD.shape[1] > 1:
      return super().__call__(x_BxLxD, sparse)
    up_FxD = self.up_FxD[...] if self.config.shape != "plain" else None
    y_BxD, active_B = sparse_ffn(
        x_BxLxD[:, 0], self.gate_FxD[...], up_FxD, self.down_FxD[...],
        select=self.select, up_activation=self.up_activation,
        implementation=self.implementation)
    return y_BxD[:, None], ActiveCount(active_B[:, None])
