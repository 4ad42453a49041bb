"""FATReLU, x where x >= t else 0 with t = 0.1, on the gate of a gated layer.

Kurtz et al., 2020. Unlike shifted ReLU it keeps what survives as it is, so it
jumps at t. ProSparse applies it after training (see prosparse.py); here it is
trained with.

  python -m sparse_lm.train --config=configs/methods/fatrelu.py --workdir=runs/methods/fatrelu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "fatrelu",
      "model.ffn.threshold": 0.1,
  })
