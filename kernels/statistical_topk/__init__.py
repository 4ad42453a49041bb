"""Statistical top-k of rows, with what a gated layer does next."""

from sparse_lm.kernels.statistical_topk.api import (
    IMPLEMENTATIONS as IMPLEMENTATIONS)
from sparse_lm.kernels.statistical_topk.api import choose as choose
from sparse_lm.kernels.statistical_topk.api import gated_topk as gated_topk
from sparse_lm.kernels.statistical_topk.api import unsupported as unsupported
