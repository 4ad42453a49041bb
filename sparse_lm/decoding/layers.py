"""Feed-forward layers laid out for decoding."""

from flax import nnx
import jax

from sparse_lm.config import RELU_FAMILY
from sparse_lm.kernels.gaussian import quantile
from sparse_lm.kernels.sparse_ffn import (Elementwise, Select,
                                          StatisticalTopk,
                                          add_norm_and_sparse_ffn, choose,
                                          layout, sparse_ffn, unsupported)
from sparse_lm.model.activity import ActiveCount, Activity
from sparse_lm.model.ffn import FFN, apply_sparsifier
from sparse_lm.model.layers import RMSNorm, project


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


def project_rows(x_BxLxD: jax.Array, rows_FxD: jax.Array) -> jax.Array:
  """One number a row of the matrix (B, L, F), in x's type."""
  return jax.lax.dot_general(x_BxLxD, rows_FxD, (((2,), (1,)), ((), ())))


def make_select(ffn: FFN, sparse: bool) -> Select:
  """How a layer makes activations of scores, for the kernel."""
  config = ffn.config
  if not sparse or config.sparsifier == "none":
    return Elementwise(ffn.activation)
  k, neurons = config.num_active, config.num_neurons
  if (config.sparsifier == "statistical_topk" and not config.huber_delta
      and k < neurons):
    return StatisticalTopk(float(quantile(k, neurons)), ffn.activation,
                           config.bessel)
  activation = ffn.activation  # Not all of the layer, which has parameters.
  return lambda score_BxF: activation(apply_sparsifier(score_BxF, config))


class NeuronMajorFFN(FFN):
  """An FFN whose `gate` and `up` have a row a neuron, as `down` has.

  One token a row of the batch reads the rows of active neurons alone, by
  `sparse_lm.kernels.sparse_ffn`, where that is faster; on a GPU a batch of more
  than 8, and everywhere a prompt, of many tokens, reads everything.
  """

  def __init__(self, ffn: FFN, sparse: bool, implementation: str | None):
    """Takes over the parameters of `ffn`.

    Args:
      ffn: the layer as training has it; `can_skip` must hold.
      sparse: whether its sparsifier is on.
      implementation: of the kernel; None: the fastest, or none.
    """
    def lay_out(rows_FxD):
      return layout(rows_FxD, implementation) if implementation else rows_FxD

    self.config, self.inputs = ffn.config, ffn.inputs
    self.activation, self.up_activation = ffn.activation, ffn.up_activation
    self.implementation = implementation
    self.select = make_select(ffn, sparse)
    self.gate_FxD = nnx.Param(ffn.gate_DxF[...].T)
    self.down_FxD = nnx.Param(lay_out(ffn.down_FxD[...]))
    if self.config.shape != "plain":
      self.up_FxD = nnx.Param(lay_out(ffn.up_DxF[...].T))

  def project_gate(self, x_gate_BxLxD: jax.Array) -> jax.Array:
    return project_rows(x_gate_BxLxD, self.gate_FxD[...])

  def project_up(self, x_up_BxLxD: jax.Array) -> jax.Array:
    rows_FxD = self.up_FxD[...].reshape(self.config.num_neurons, -1)
    return project_rows(x_up_BxLxD, rows_FxD)

  def project_down(self, hidden_BxLxF: jax.Array) -> jax.Array:
    rows_FxD = self.down_FxD[...].reshape(self.config.num_neurons, -1)
    return project(hidden_BxLxF, rows_FxD)

  def matrices(self) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    up_FxD = self.up_FxD[...] if self.config.shape != "plain" else None
    return self.gate_FxD[...], up_FxD, self.down_FxD[...]

  def chosen(self, x_BxD: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """The kernel for one token a row; None: every neuron is computed."""
    return self.implementation or choose(
        jax.devices()[0], x_BxD, *self.matrices(), self.select,
        self.up_activation)

  def unsupported(self, implementation: str,
                  x_BxD: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why a kernel cannot compute it for one token a row, None where it can."""
    return unsupported(implementation, x_BxD, *self.matrices(), self.select,
                       self.up_activation)

  def skips(self, x_BxLxD: jax.Array) -> bool:
    """Whether a kernel computes it: one token a row."""
    return x_BxLxD.shape[1] == 1 and self.chosen(x_BxLxD[:, 0]) is not None

  def __call__(self, x_BxLxD: jax.Array, sparse: bool | jax.Array = True
               ) -> tuple[jax.Array, Activity | ActiveCount]:
    if not self.skips(x_BxLxD):
      return super().__call__(x_BxLxD, sparse)
    x_BxD = x_BxLxD[:, 0]
    y_BxD, active_B = sparse_ffn(x_BxD, *self.matrices(), **self._how(x_BxD))
    return y_BxD[:, None], ActiveCount(active_B[:, None])

  def add_norm_and_call(
      self, x_BxLxD: jax.Array, y_BxLxD: jax.Array, y_norm: RMSNorm,
      norm: RMSNorm) -> tuple[jax.Array, jax.Array, ActiveCount]:
    """x + y_norm(y), and `self` of its norm, by a kernel: `skips` must hold."""
    x_BxD, y_BxD = x_BxLxD[:, 0], y_BxLxD[:, 0]
    x_BxD, y_BxD, active_B = add_norm_and_sparse_ffn(
        x_BxD, y_BxD, y_norm.scale_D[...], norm.scale_D[...], *self.matrices(),
        epsilon=norm.epsilon, **self._how(x_BxD))
    return x_BxD[:, None], y_BxD[:, None], ActiveCount(active_B[:, None])

  def _how(self, x_BxD: jax.Array) -> dict:
    return dict(select=self.select, up_activation=self.up_activation,
                implementation=self.chosen(x_BxD))
