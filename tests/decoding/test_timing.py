"""What the benchmark of decoding says of bytes."""

import dataclasses

from sparse_lm.config import AttentionConfig, FFNConfig, ModelConfig
from sparse_lm.decoding import timing


def test_bytes_of_a_token():
  """Of two layers in turn: one sees 4 tokens, the other all."""
  attention = AttentionConfig(
      shape="dense", num_query_heads=4, num_kv_heads=2, head_dim=8,
      sliding_window=4, global_every=2)
  model = ModelConfig(
      vocab_size=100, num_layers=2, model_dim=16, attention=attention,
      ffn=FFNConfig(shape="gated", num_neurons=20, sparsifier="none"))
  weights = 100 * 16 + 2 * (3 * 16 * 20 + 16 * 8 * (2 * 4 + 2 * 2))
  keys = 2 * 8  # numbers of a token, in each layer, and as many of values
  assert timing._decode_bytes(model, 10, 2) == 2 * (
      weights + 2 * keys * (4 + 10))
  spark = dataclasses.replace(model, attention=dataclasses.replace(
      attention, shape="spark", predictor_dim=2, top_k=3))
  # Two queries a group keep six keys, or all four: of these all of a head.
  first, rest = 2 * 2, 2 * (2 * 8 - 2)
  assert timing._decode_bytes(spark, 10, 2) == 2 * (
      weights + first * (4 + 10) + rest * (4 + 6))
