"""Mixture-of-Channels, 2 of 8: the two largest gates of each eight, then SiLU.

A pattern that hardware can index: a quarter of the channels at every token, as
many in every block.

  python -m sparse_lm.train --config=configs/methods/moc.py --workdir=runs/methods/moc
"""

from sparse_lm.config import Config
from sparse_lm.configs.methods import base


def get_config(size: str = "tiny") -> Config:
  return base.make(size, **{
      "model.ffn.activation": "silu",
      "model.ffn.sparsifier": "block_topk",
      "model.ffn.block_size": 8,
      "model.ffn.active_fraction": 0.25,
  })
