"""Block Q-Sparse: 16 of each 32 neighbours in every linear map's input.

arXiv 2407.10969: q_sparse.py with a pattern that batches and hardware can
share.

  python -m sparse_lm.train --config=configs/methods/block_q_sparse.py --workdir=runs/methods/block_q_sparse
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "relu2",
      "model.linear_inputs.sparsifier": "block_topk",
      "model.linear_inputs.block_size": 32,
      "model.linear_inputs.active_fraction": 0.5,
  })
