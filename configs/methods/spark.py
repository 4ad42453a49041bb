"""Spark Transformer: Spark FFN and Spark attention (arXiv 2506.06644).

  python -m sparse_lm.train --config=configs/methods/spark.py --workdir=runs/methods/spark
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.shape": "spark",
      "model.ffn.sparsifier": "statistical_topk",
      "model.ffn.active_fraction": 0.08,
      "model.attention.shape": "spark",
  })
