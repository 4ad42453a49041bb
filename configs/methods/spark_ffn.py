"""Spark FFN, 8% active, with dense attention (arXiv 2506.06644, Eq. 2).

Statistical top-k on a predictor that is cut out of the parameters: the first
half of the input dims chooses, and gates, what the other half computes.

  python -m sparse_lm.train --config=configs/methods/spark_ffn.py --workdir=runs/methods/spark_ffn
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.shape": "spark",
      "model.ffn.sparsifier": "statistical_topk",
      "model.ffn.active_fraction": 0.08,
  })
