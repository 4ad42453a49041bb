"""Runs `train` as one process of a cluster on this machine.

  python process.py INDEX COUNT PORT --config=... --workdir=...
"""

import sys

import jax

from sparse_lm import train

if __name__ == "__main__":
  index, count, port = map(int, sys.argv[1:4])
  jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
  train.main(sys.argv[4:])
