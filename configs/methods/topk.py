"""Exact top-k of the gate before its GELU, 8%: the "Topk" baseline.

Spark Transformer (arXiv 2506.06644, Section 4) compares with it: no predictor,
so the gate is computed whole. Ties are broken by position: exactly k are kept.

  python -m sparse_lm.train --config=configs/methods/topk.py --workdir=runs/methods/topk
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.sparsifier": "topk",
      "model.ffn.active_fraction": 0.08,
  })
