"""ProSparse's control without a penalty (arXiv 2402.13516, Table 4).

"Vanilla ReLU": as prosparse.py, ReLU in place of SiLU half way, no L1.

  python -m sparse_lm.train --config=configs/methods/prosparse_relu.py --workdir=runs/methods/prosparse_relu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import prosparse


def get_config(size: str = "tiny") -> Config:
  return prosparse.continued(size)
