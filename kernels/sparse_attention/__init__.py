"""Spark attention for one token a row that reads the kept keys alone."""

from sparse_lm.kernels.sparse_attention.api import (
    IMPLEMENTATIONS as IMPLEMENTATIONS)
from sparse_lm.kernels.sparse_attention.api import choose as choose
from sparse_lm.kernels.sparse_attention.api import (
    sparse_attention as sparse_attention)
from sparse_lm.kernels.sparse_attention.api import unsupported as unsupported
from sparse_lm.kernels.sparse_attention.api import (
    write_and_attend as write_and_attend)
