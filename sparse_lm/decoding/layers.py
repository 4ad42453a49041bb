"""Feed-forward layers laid out for decoding."""

from flax import nnx
import jax

from sparse_lm.config import RELU_FAMILY
from sparse_lm.kernels.sparse_ffn import sparse_ffn
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


class NeuronMajorFFN(FFN):
  """An FFN whose `up` has a row a neuron, as `down` has.

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
    self.sparse, self.implementation = sparse, implementation
    self.gate_DxF, self.down_FxD = ffn.gate_DxF, ffn.down_FxD
    if self.config.shape != "plain":
      self.up_FxD = nnx.Param(ffn.up_DxF[...].T)

  def project_up(self, x_up_BxLxD: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_up_BxLxD, self.up_FxD[...],
                               (((2,), (1,)), ((), ())))

  def _select(self, score_BxF: jax.Array) -> jax.Array:
    if self.sparse:
      score_BxF = apply_sparsifier(score_BxF, self.config)
    return self.activation(score_BxF)

  def __call__(self, x_BxLxD: jax.Array, sparse: bool | jax.Array = True
               ) -> tuple[jax.Array, Activity | ActiveCount]:
    if x_BxLxD.shape[1] > 1:
      return super().__call__(x_BxLxD, sparse)
    x_gate, x_up = (x[:, 0] for x in self.split_input(x_BxLxD))
    gated = self.config.shape != "plain"
    y_BxD, active_B = sparse_ffn(
        x_gate, x_up if gated else None, self.gate_DxF[...],
        self.up_FxD[...] if gated else None, self.down_FxD[...],
        select=self._select, up_activation=self.up_activation,
        implementation=self.implementation)
    return y_BxD[:, None], ActiveCount(active_B[:, None])
