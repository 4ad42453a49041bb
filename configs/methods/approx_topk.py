"""topk.py by jax.lax.approx_max_k: what a sort costs, approximately, on a TPU.

The Spark paper (arXiv 2506.06644, Section 4.4) finds it more than ten times
slower to train than statistical top-k even at a recall of 0.5. Only TPUs
approximate; other backends are exact.

  python -m sparse_lm.train --config=configs/methods/approx_topk.py --workdir=runs/methods/approx_topk
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.sparsifier": "approx_topk",
      "model.ffn.active_fraction": 0.08,
      "model.ffn.recall": 0.5,
  })
