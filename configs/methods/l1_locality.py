"""l1_controller.py with BlockFFN's two losses, so that tokens share neurons.

arXiv 2507.08771, Section 3.3, there for experts, here for neurons: adjacent
tokens, and chunks of 64. What to look at is the union of active neurons over 8
and 32 tokens: a batch or a draft that is verified together reads so many.

  python -m sparse_lm.train --config=configs/methods/l1_locality.py --workdir=runs/methods/l1_locality
"""

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.configs.methods import l1_controller


def get_config(size: str = "tiny") -> Config:
  return config_lib.replace(l1_controller.get_config(size), **{
      "training.penalty.adjacent": 2e-3,
      "training.penalty.chunk": 5e-2,
      "training.penalty.chunk_length": 64,
  })
