"""Squared ReLU on the gate of a gated layer.

Q-Sparse's layer (arXiv 2407.10969) without its top-k.

  python -m sparse_lm.train --config=configs/methods/relu2glu.py --workdir=runs/methods/relu2glu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "relu2",
  })
