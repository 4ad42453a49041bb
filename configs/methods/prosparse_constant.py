"""ProSparse's control with a constant factor (arXiv 2402.13516, Table 5).

As prosparse.py, the factor at its last peak from the first step on.

  python -m sparse_lm.train --config=configs/methods/prosparse_constant.py --workdir=runs/methods/prosparse_constant
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import prosparse


def get_config(size: str = "tiny") -> Config:
  return prosparse.continued(size, **{
      "training.penalty.schedule": "constant",
      "training.penalty.factor": prosparse.LAST_PEAK[size],
      "training.penalty.over_neurons": "mean",
      "training.penalty.over_layers": "sum",
  })
