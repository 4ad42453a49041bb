"""Shifted ReLU, max(x - b, 0) with b = 0.1, on the gate of a gated layer.

"ReLU Strikes Back" (arXiv 2310.04564) shifts the ReLU of a trained model; here,
as in ProSparse's comparison (arXiv 2402.13516, Table 4), it is trained with.

  python -m sparse_lm.train --config=configs/methods/shifted_relu.py --workdir=runs/methods/shifted_relu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "shifted_relu",
      "model.ffn.threshold": 0.1,
  })
