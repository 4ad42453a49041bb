"""dReLU: ReLU on both branches of a gated layer (arXiv 2406.05955).

A neuron is active where both are positive. A decoder computes one branch whole,
and the other where the first is positive.

  python -m sparse_lm.train --config=configs/methods/drelu.py --workdir=runs/methods/drelu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "relu",
      "model.ffn.up_activation": "relu",
  })
