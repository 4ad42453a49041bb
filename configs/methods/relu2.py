"""Squared ReLU in a plain layer (Primer, arXiv 2109.08668).

"ReLU^2 Wins" (arXiv 2402.03804) found it the best of four for sparsity: its
zeros are ReLU's, and what is small becomes smaller.

  python -m sparse_lm.train --config=configs/methods/relu2.py --workdir=runs/methods/relu2
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.shape": "plain",
      "model.ffn.activation": "relu2",
  })
