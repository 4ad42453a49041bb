"""Runs `train` and dies, as by SIGKILL, at a chosen moment.

  python kill_at.py batch 6 --config=... --workdir=...   before the 6th batch
  python kill_at.py save 2 --config=... --workdir=...    inside the 2nd save,
                                     with some of its files written
"""

import os
import signal
import sys

from grain import checkpoint as grain_checkpoint

from sparse_lm import train
from sparse_lm.training import mesh


def die_on_call(owner, name, number):
  original, calls = getattr(owner, name), iter(range(1, 10**9))

  def patched(*args, **kwargs):
    if next(calls) == number:
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

  setattr(owner, name, patched)


if __name__ == "__main__":
  moment, number = sys.argv[1], int(sys.argv[2])
  if moment == "batch":
    die_on_call(mesh, "place_batch", number)
  else:
    die_on_call(grain_checkpoint.CheckpointHandler, "save", number)
  train.main(sys.argv[3:])
