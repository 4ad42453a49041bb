"""Analytic FLOPs against published numbers and hand counts."""

import dataclasses

import numpy as np
import pytest

from sparse_lm import flops
from sparse_lm.config import (AttentionConfig, FFNConfig, LinearInputsConfig,
                              ModelConfig)
from sparse_lm.configs import gemma2_2b, spark_2b

SPARK, GEMMA = spark_2b.get_config().model, gemma2_2b.get_config().model


def test_ffn_of_gemma_2_2b():
  """127.4 to 36.2 MFLOP per token and layer (arXiv 2506.06644, Section 2.1)."""
  dense = flops.dense_flops(GEMMA).ffn / 26
  assert dense == flops.dense_flops(SPARK).ffn / 26
  assert dense == pytest.approx(127.4e6, rel=1e-3)
  assert flops.executed_flops(SPARK).ffn / 26 == pytest.approx(36.2e6, rel=2e-3)
  assert flops.executed_flops(GEMMA) == flops.dense_flops(GEMMA)


def test_attention_formula_of_the_paper():
  """At P = E/2 a head does E n + 3 E min(k, n) instead of 4 E n."""
  config = ModelConfig(num_layers=1, attention=AttentionConfig(
      num_query_heads=1, num_kv_heads=1, head_dim=8, predictor_dim=4, top_k=5))
  n, kept = 20.0, 5.0
  executed = flops.executed_flops(config, visible_keys_N=[n],
                                  attended_keys_N=[kept])
  assert executed.attention == 8 * n + 3 * 8 * kept


def test_dense_flops_by_counting_products():
  """Multiply-adds of every matrix product of a small model, by hand."""
  config = ModelConfig(
      vocab_size=50, context_length=6, num_layers=2, model_dim=10,
      ffn=FFNConfig(shape="gated", num_neurons=7, active_fraction=0.5),
      attention=AttentionConfig(shape="dense", num_query_heads=4,
                                num_kv_heads=2, head_dim=6, sliding_window=3))
  dense = flops.dense_flops(config)
  assert dense.ffn == 2 * (3 * 2 * 10 * 7)
  assert dense.projections == 2 * 2 * 10 * 6 * (4 + 2 + 2 + 4)
  assert dense.logits == 2 * 10 * 50
  pairs_sliding = 1 + 2 + 3 + 3 + 3 + 3
  pairs_global = 1 + 2 + 3 + 4 + 5 + 6
  per_pair = 4 * (2 * 6 + 2 * 6)  # heads x (score + value)
  assert dense.attention == pytest.approx(
      per_pair * (pairs_sliding + pairs_global) / 6)
  assert dense.total == (dense.ffn + dense.projections + dense.attention
                         + dense.logits)


# gate, up and down of F 20 at D 10; H 4, K 2, E 6, so that mixed values are 24.
SMALL = ModelConfig(
    vocab_size=50, context_length=6, num_layers=2, model_dim=10,
    ffn=FFNConfig(shape="gated", num_neurons=20, sparsifier="none"),
    attention=AttentionConfig(shape="dense", num_query_heads=4, num_kv_heads=2,
                              head_dim=6))


def with_ffn(**keys):
  return dataclasses.replace(SMALL, ffn=dataclasses.replace(SMALL.ffn, **keys))


@pytest.mark.parametrize("shape, gate_dim, up_dim", [
    ("plain", 10, 0), ("gated", 10, 10), ("spark", 4, 6)])
def test_drelu_by_counting_products(shape, gate_dim, up_dim):
  """All gates; up where the gate is active; down where the product is."""
  keys = {} if shape == "plain" else {"up_activation": "relu"}
  config = with_ffn(shape=shape, activation="relu", predictor_dim=4, **keys)
  executed = flops.executed_flops(config, active_neurons_N=[8.0, 9.0],
                                  nonzero_hidden_N=[3.0, 4.0])
  assert executed.ffn == (2 * 2 * gate_dim * 20 + 2 * up_dim * (8 + 9)
                          + 2 * 10 * (3 + 4))
  dense = flops.dense_flops(config)
  assert dense.ffn == 2 * 2 * 20 * (gate_dim + up_dim + 10)
  assert (executed.projections, executed.attention, executed.logits) == (
      dense.projections, dense.attention, dense.logits)


def test_down_is_of_the_active_neurons_where_outputs_were_not_counted():
  executed = flops.executed_flops(SMALL, active_neurons_N=[8.0, 9.0])
  assert executed.ffn == 2 * 2 * 10 * 20 + 2 * 10 * 17 + 2 * 10 * 17


@pytest.mark.parametrize("pattern", [
    {"sparsifier": "topk"}, {"sparsifier": "block_topk", "block_size": 2}])
def test_q_sparse_by_counting_products(pattern):
  """Half of each input: 5 of D, 12 of the mixed values, `nonzero` of F."""
  config = dataclasses.replace(SMALL, linear_inputs=LinearInputsConfig(
      active_fraction=0.5, **pattern))
  executed = flops.executed_flops(config, active_neurons_N=[20.0, 20.0],
                                  nonzero_hidden_N=[10.0, 9.0])
  assert executed.ffn == 2 * 2 * 5 * (20 + 20) + 2 * 10 * (10 + 9)
  query, key_value, output = 2 * 5 * 24, 2 * 5 * 12, 2 * 12 * 10
  assert executed.projections == 2 * (query + 2 * key_value + output)
  dense = flops.dense_flops(config)
  assert dense == flops.dense_flops(SMALL)
  assert (executed.attention, executed.logits) == (dense.attention,
                                                   dense.logits)


def test_q_sparse_and_active_neurons_together():
  """ReLU2GLU: up reads 3 of 10 inputs, in the active neurons alone."""
  config = dataclasses.replace(
      with_ffn(activation="relu2"), linear_inputs=LinearInputsConfig(
          sparsifier="topk", active_fraction=0.3))
  executed = flops.executed_flops(config, active_neurons_N=[9.0, 7.0],
                                  nonzero_hidden_N=[6.0, 6.0])
  assert executed.ffn == pytest.approx(
      2 * 2 * 3 * 20 + 2 * 3 * (9 + 7) + 2 * 10 * (6 + 6))
  # Of the 24 mixed values 7 are kept: 0.3 to the nearest whole number.
  assert executed.projections == pytest.approx(
      2 * (2 * 3 * 24 + 2 * 2 * 3 * 12 + 2 * 7 * 10))


def test_sparse_layers_by_counting_products():
  """Gemma 3n's rule: 5 of 20 neurons in layer 0, all of them in layer 1."""
  config = with_ffn(sparsifier="topk", active_fraction=0.25,
                    sparse_layers="0")
  executed = flops.executed_flops(config).ffn
  assert executed == 2 * (10 * 20 + 10 * 5 + 10 * 5) + 2 * (3 * 10 * 20)
  everywhere = with_ffn(sparsifier="topk", active_fraction=0.25)
  assert flops.executed_flops(everywhere).ffn == 2 * 2 * (10 * 20 + 2 * 10 * 5)


def test_measured_flops_are_those_of_the_measured_counts():
  result = {"active_fraction_N": [0.4, 0.45], "hidden_fraction_N": [0.15, 0.2],
            "attended_keys_N": [3.0, 3.5], "visible_keys_N": [3.5, 3.5]}
  a = flops.measured_flops(SMALL, result)
  b = flops.executed_flops(SMALL, [8, 9], [3.0, 3.5], [3.5, 3.5], [3, 4])
  assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b))


def test_visible_keys_of_long_sequences():
  seen = flops.visible_keys(SPARK, 8192)
  assert seen[1] == pytest.approx(8193 / 2)  # global
  assert seen[0] == pytest.approx(np.minimum(np.arange(1, 8193), 4096).mean())


def test_peak_of_the_longest_matching_name():
  class Device:
    def __init__(self, kind):
      self.device_kind = kind

  assert flops.peak_flops(Device("NVIDIA H200")) == 989e12
  assert flops.peak_flops(Device("TPU v5 lite")) == 197e12
  assert flops.peak_flops(Device("TPU v5p")) == 459e12
  assert flops.peak_flops(Device("cpu")) is None
