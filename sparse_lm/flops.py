"""Analytic FLOPs per token, dense-equivalent and executed.

A multiply and an add count as two. Only matrix products count; norms, softmax
and activations are left out, as is usual. The compiler's own count is of no use
here: `cost_analysis()` counts the body of a scan once.

Executed FLOPs are those of a program that skips what the sparsity lets it skip
(arXiv 2506.06644, Sections 2.1 and 2.2):

    FFN        gate 2 D_gate F  +  up 2 D_up k  +  down 2 D k'
    attention  2 P n  +  (2 (E - P) + 2 E) kept     per query head, n keys seen

with k the active neurons (those whose `up` is wanted), k' those of them whose
intermediate output is not zero, and `kept` the attended keys. Where only a
fraction of each input is kept (Q-Sparse, arXiv 2407.10969), the projections,
`gate` and `up` shrink by that fraction.
"""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from sparse_lm.config import ModelConfig
from sparse_lm.model.attention import layer_windows


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one token's forward pass, summed over the layers."""

  ffn: float
  projections: float  # query, key, value and output of attention
  attention: float  # scores and mixed values
  logits: float

  @property
  def total(self) -> float:
    return self.ffn + self.projections + self.attention + self.logits


def visible_keys(config: ModelConfig, length: int | None = None) -> np.ndarray:
  """Keys that a query sees in each layer, mean over a causal sequence (N,).

  Args:
    config: the model.
    length: tokens in the sequence; None: the context length.
  """
  length = length or config.context_length
  positions = np.arange(1, length + 1)
  return np.array([np.minimum(positions, window).mean() for window in
                   layer_windows(config.attention, config.num_layers)])


def _projections(config: ModelConfig, inputs: float = 1.0,
                 mixed: float = 1.0) -> float:
  """Of all layers, with so much of D and of the mixed values kept."""
  a = config.attention
  heads = (a.num_query_heads + 2 * a.num_kv_heads) * inputs
  return (config.num_layers * 2 * config.model_dim * a.head_dim
          * (heads + a.num_query_heads * mixed))


def inputs_kept(config: ModelConfig) -> float:
  """The fraction of their inputs that the blocks' linear maps see."""
  return config.linear_inputs.num_active(config.model_dim) / config.model_dim


def _logits(config: ModelConfig) -> float:
  return 2 * config.model_dim * config.vocab_size


def dense_flops(config: ModelConfig,
                visible_keys_N: Sequence[float] | None = None) -> Flops:
  """FLOPs with every neuron and every visible key computed.

  Args:
    config: the model.
    visible_keys_N: measured keys visible per query and layer; None: those of
      one causal sequence of the context's length.
  """
  a = config.attention
  gate_dim, up_dim = config.ffn.input_dims(config.model_dim)
  ffn = 2 * config.ffn.num_neurons * (gate_dim + up_dim + config.model_dim)
  seen = np.sum(visible_keys(config) if visible_keys_N is None
                else visible_keys_N)
  return Flops(ffn=config.num_layers * ffn, projections=_projections(config),
               attention=a.num_query_heads * 4 * a.head_dim * seen,
               logits=_logits(config))


def _aimed_at(config: ModelConfig) -> np.ndarray:
  """Active neurons that each layer's sparsifier aims at (N,)."""
  ffn = config.ffn
  return np.where(config.sparse_layers, ffn.num_active, ffn.num_neurons)


def executed_flops(config: ModelConfig,
                   active_neurons_N: Sequence[float] | None = None,
                   attended_keys_N: Sequence[float] | None = None,
                   visible_keys_N: Sequence[float] | None = None,
                   nonzero_hidden_N: Sequence[float] | None = None) -> Flops:
  """FLOPs with what is not active skipped.

  Args:
    config: the model.
    active_neurons_N: measured active neurons per token and layer; None: what
      the sparsifier aims at.
    attended_keys_N: measured keys attended per query and layer; None: top_k,
      or the visible ones where they are fewer.
    visible_keys_N: as in `dense_flops`.
    nonzero_hidden_N: measured non-zero intermediate outputs per token and
      layer; None: the active neurons, as far as `down`'s input keeps them.
  """
  a, dim = config.attention, config.model_dim
  active = np.asarray(_aimed_at(config) if active_neurons_N is None
                      else active_neurons_N)
  nonzero = (np.minimum(active, config.linear_inputs.num_active(
      config.ffn.num_neurons)) if nonzero_hidden_N is None
             else np.asarray(nonzero_hidden_N))
  gate_dim, up_dim = config.ffn.input_dims(dim)
  inputs = inputs_kept(config)
  ffn = (2 * gate_dim * inputs * config.ffn.num_neurons * config.num_layers
         + 2 * up_dim * inputs * active.sum() + 2 * dim * nonzero.sum())
  width = a.num_query_heads * a.head_dim
  return Flops(
      ffn=ffn, logits=_logits(config),
      projections=_projections(
          config, inputs, config.linear_inputs.num_active(width) / width),
      attention=_executed_attention(config, attended_keys_N, visible_keys_N))


def _executed_attention(config, attended_keys_N, visible_keys_N) -> float:
  a = config.attention
  seen = np.asarray(visible_keys(config) if visible_keys_N is None
                    else visible_keys_N)
  predictor, kept = a.head_dim, seen
  if a.shape == "spark":
    predictor = a.predictor_dim
    kept = (np.minimum(seen, a.top_k) if attended_keys_N is None
            else np.asarray(attended_keys_N))
  return a.num_query_heads * (
      2 * predictor * seen.sum()
      + (2 * (a.head_dim - predictor) + 2 * a.head_dim) * kept.sum())


def measured_flops(config: ModelConfig, result: dict) -> Flops:
  """`executed_flops` of what `training.metrics.summarize` measured."""
  neurons = config.ffn.num_neurons
  return executed_flops(
      config, neurons * np.asarray(result["active_fraction_N"]),
      result["attended_keys_N"], result["visible_keys_N"],
      neurons * np.asarray(result["hidden_fraction_N"]))


# Dense bfloat16 matrix FLOP/s of one device, from the makers' data sheets,
# by a part of jax's `device_kind`.
PEAK_FLOPS = {
    "v4": 275e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12,
    "v5": 459e12, "v6 lite": 918e12, "v6e": 918e12, "a100": 312e12,
    "h100": 989e12, "h200": 989e12, "b200": 2250e12, "l4": 121e12,
    "l40": 181e12, "l40s": 362e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """The device's bfloat16 peak in FLOP/s, or None where it is not known."""
  kind = device.device_kind.lower()
  matches = [name for name in PEAK_FLOPS if name in kind]
  return PEAK_FLOPS[max(matches, key=len)] if matches else None
