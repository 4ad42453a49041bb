"""l1_controller.py at 1%, its dead neurons re-initialised as they die.

Targeted re-initialisation (arXiv 2603.23198): a tenth of a fresh draw is mixed
into the gate weights of every neuron that has not fired for a while, each step
until it fires again.

  python -m sparse_lm.train --config=configs/methods/l1_revive.py --workdir=runs/methods/l1_revive
"""

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.configs.methods import l1_controller


def get_config(size: str = "tiny") -> Config:
  config = l1_controller.get_config(size, target_active_fraction=0.01)
  step_tokens = config.training.batch_size * config.model.context_length
  return config_lib.replace(config, **{
      "training.dead_neurons.after_tokens": 10 * step_tokens,
      "training.dead_neurons.reinitialize": 0.1,
  })
