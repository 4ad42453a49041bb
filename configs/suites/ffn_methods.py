"""Every way of training a sparse FFN, side by side, at equal size and tokens.

  python -m sparse_lm.compare --suite=configs/suites/ffn_methods.py --workdir=runs/ffn_methods

trains the configs of configs/methods and writes results/ffn_methods_tiny.json,
.md and .png; --size=small is for one GPU, a minute or two a method.
"""

import importlib

from sparse_lm.configs.methods import l1_controller
from sparse_lm.training.suite import Method, Suite

# Files of configs/methods, in the order of the table.
LABELS = {
    "geglu": "GeGLU (dense)",
    "swiglu": "SwiGLU (dense)",
    "relu": "ReLU",
    "relu2": "squared ReLU",
    "reglu": "ReGLU",
    "relu2glu": "squared-ReLU GLU",
    "shifted_relu": "shifted ReLU, b 0.1",
    "fatrelu": "FATReLU, t 0.1",
    "drelu": "dReLU",
    "topk": "Topk 8%",
    "approx_topk": "approximate top-k 8%",
    "moc": "MoC, 2 of 8",
    "gemma3n": "Gemma 3n rule",
    "spark_ffn": "Spark FFN 8%",
    "spark": "Spark FFN + attention",
    "q_sparse": "Q-Sparse 60%",
    "block_q_sparse": "Block Q-Sparse, 16 of 32",
    "prosparse_relu": "ReLU half way (ProSparse's control)",
    "prosparse_constant": "ReLU half way + constant L1",
    "prosparse": "ProSparse, before its shift",
    "prosparse_shifted": "ProSparse",
    "l1_controller_5": "ReGLU + L1, controller at 5%",
    "l1_controller_1": "ReGLU + L1, controller at 1%",
    "l1_revive": "ReGLU + L1 at 1%, dead neurons revived",
    "l1_locality": "ReGLU + L1 at 5% + BlockFFN's losses",
}
_SHIFTED = {"prosparse_shifted": "prosparse"}
_CONTROLLED = {"l1_controller_5": 0.05, "l1_controller_1": 0.01}


def _config(name: str, size: str):
  if name in _CONTROLLED:
    return l1_controller.get_config(size, _CONTROLLED[name])
  module = importlib.import_module(
      f"sparse_lm.configs.methods.{_SHIFTED.get(name, name)}")
  return module.get_config(size)


def get_suite(size: str = "tiny") -> Suite:
  return Suite(f"ffn_methods_{size}", tuple(
      Method(name, label, _config(name, size),
             start="swiglu" if name in ("prosparse", "prosparse_constant",
                                        "prosparse_relu") else "",
             shift=_SHIFTED.get(name, ""))
      for name, label in LABELS.items()))
