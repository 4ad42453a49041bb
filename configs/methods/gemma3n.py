"""Gemma 3n's rule: 95% sparse gates in the first layers, dense GeGLU after.

Statistical top-k on the gate, without a predictor, in the first 10 of its 30 or
35 layers (`activation_sparsity_pattern` of its released config); here in the
first third, rounded up.

  python -m sparse_lm.train --config=configs/methods/gemma3n.py --workdir=runs/methods/gemma3n
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  last = -(-base.make(size).model.num_layers // 3) - 1
  return base.make(size, **{
      "model.ffn.sparsifier": "statistical_topk",
      "model.ffn.active_fraction": 0.05,
      "model.ffn.sparse_layers": f"0-{last}",
  })
