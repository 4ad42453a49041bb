"""Gemma-2 2B, the dense twin of spark_2b: same parameters, data and tokens."""

from sparse_lm import config as config_lib
from sparse_lm.configs import spark_2b


def get_config() -> config_lib.Config:
  return config_lib.replace(spark_2b.get_config(), **{
      "model.ffn.shape": "gated",
      "model.ffn.sparsifier": "none",
      "model.ffn.num_neurons": 9216,
      "model.attention.shape": "dense",
  })
