"""ReGLU: ReLU on the gate of a gated layer (Shazeer, 2020, arXiv 2002.05202).

Where the gate is zero neither up nor down is needed.

  python -m sparse_lm.train --config=configs/methods/reglu.py --workdir=runs/methods/reglu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "relu",
  })
