"""SwiGLU, dense (Shazeer, 2020, arXiv 2002.05202; LLaMA).

Its checkpoint half way, which is kept, is what the ProSparse configs start
from.

  python -m sparse_lm.train --config=configs/methods/swiglu.py --workdir=runs/methods/swiglu
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  num_steps = base.make(size).training.num_steps
  return base.make(size, **{
      "model.ffn.activation": "silu",
      "training.keep_steps": (num_steps - num_steps // 2,),
  })
