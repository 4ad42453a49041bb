"""Q-Sparse: top-k of the input of every linear map (arXiv 2407.10969).

60% of each input is kept by magnitude and divided by its root mean square; the
gradient passes straight through. The FFN is a squared-ReLU GLU.

  python -m sparse_lm.train --config=configs/methods/q_sparse.py --workdir=runs/methods/q_sparse
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "relu2",
      "model.linear_inputs.sparsifier": "topk",
      "model.linear_inputs.active_fraction": 0.6,
  })
