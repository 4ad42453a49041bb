"""The dense twin of spark_tiny: same data, tokens, parameters; no sparsity.

Two of Spark's matrices hold as much as three of the gated GELU layer's at two
thirds of the neurons.

  python -m sparse_lm.train --config=configs/dense_tiny.py --workdir=runs/dense_tiny

Hardware: 2 CPU cores, Python 3.11, jax 0.10.2, 2026-11-22: 3.6 minutes in all.
Result: 3.63 nats per token, 1.56 bits per byte on held-out files.
"""

from sparse_lm import config as config_lib
from sparse_lm.configs import spark_tiny


def get_config() -> config_lib.Config:
  spark = spark_tiny.get_config()
  return config_lib.replace(spark, **{
      "model.ffn.shape": "gated",
      "model.ffn.sparsifier": "none",
      "model.ffn.num_neurons": spark.model.ffn.num_neurons * 2 // 3,
      "model.attention.shape": "dense",
  })
