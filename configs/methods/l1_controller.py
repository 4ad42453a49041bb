"""ReGLU with L1, its factor driven to a wanted active fraction.

The penalty of "Sparser, Faster, Lighter" (arXiv 2603.23198): the intermediate
output's absolute values, summed over neurons, mean over tokens and layers. The
factor is ReMoE's controller's (arXiv 2412.14711, Section 3.3): raised after
every step with too many active neurons, lowered after every other.

  python -m sparse_lm.train --config=configs/methods/l1_controller.py --workdir=runs/methods/l1_controller --config.training.penalty.target_active_fraction=0.01
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny",
               target_active_fraction: float = 0.05) -> Config:
  return base.make(size, **{
      "model.ffn.activation": "relu",
      "training.penalty.schedule": "controller",
      "training.penalty.factor": 1e-5,
      "training.penalty.rate": 1.05,
      "training.penalty.target_active_fraction": target_active_fraction,
  })
