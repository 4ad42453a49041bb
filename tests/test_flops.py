"""Analytic FLOPs against published numbers and hand counts."""

import numpy as np
import pytest

from sparse_lm import flops
from sparse_lm.config import AttentionConfig, FFNConfig, ModelConfig
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
