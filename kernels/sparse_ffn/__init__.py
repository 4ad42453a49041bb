"""A feed-forward layer for a few tokens that reads active neurons alone."""

from sparse_lm.kernels.sparse_ffn.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from sparse_lm.kernels.sparse_ffn.api import (
    add_norm_and_sparse_ffn as add_norm_and_sparse_ffn)
from sparse_lm.kernels.sparse_ffn.api import choose as choose
from sparse_lm.kernels.sparse_ffn.api import layout as layout
from sparse_lm.kernels.sparse_ffn.api import sparse_ffn as sparse_ffn
from sparse_lm.kernels.sparse_ffn.api import unsupported as unsupported
from sparse_lm.kernels.sparse_ffn.select import Elementwise as Elementwise
from sparse_lm.kernels.sparse_ffn.select import Select as Select
from sparse_lm.kernels.sparse_ffn.select import (
    StatisticalTopk as StatisticalTopk)
