"""GeGLU, dense: the baseline (Shazeer, 2020, arXiv 2002.05202; Gemma).

Three matrices; every neuron is active.

  python -m sparse_lm.train --config=configs/methods/geglu.py --workdir=runs/methods/geglu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "gelu_tanh",
  })
