"""ReLU in a plain layer of two matrices: down(max(up x, 0)).

The oldest sparse layer. Nothing pushes it to be sparse.

  python -m sparse_lm.train --config=configs/methods/relu.py --workdir=runs/methods/relu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.shape": "plain",
      "model.ffn.activation": "relu",
  })
