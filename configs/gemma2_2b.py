"""Gemma-2 2B, the dense twin of spark_2b: same parameters, data and tokens.

  python -m sparse_lm.train --config=configs/gemma2_2b.py --workdir=<a folder all hosts see>

on every host of a TPU v5e:16x16 (256 chips). Compiled for that topology, not
run: 7.2 GB of a chip's 16 GB, jax 0.10.2, 2026-11-22. Time and result: not
measured.
"""

from sparse_lm import config as config_lib
from sparse_lm.configs import spark_2b


def get_config() -> config_lib.Config:
  return config_lib.replace(spark_2b.get_config(), **{
      "model.ffn.shape": "gated",
      "model.ffn.sparsifier": "none",
      "model.ffn.num_neurons": 9216,
      "model.attention.shape": "dense",
  })
