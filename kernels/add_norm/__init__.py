"""A residual stream's sum and its norm, for a few tokens."""

from sparse_lm.kernels.add_norm.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from sparse_lm.kernels.add_norm.api import add_norm as add_norm
from sparse_lm.kernels.add_norm.api import (
    add_norm_and_project as add_norm_and_project)
from sparse_lm.kernels.add_norm.api import choose as choose
from sparse_lm.kernels.add_norm.api import unsupported as unsupported
