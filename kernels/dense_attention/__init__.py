"""Dense attention of one token a row to its cache, which is written too."""

from sparse_lm.kernels.dense_attention.api import (
    IMPLEMENTATIONS as IMPLEMENTATIONS)
from sparse_lm.kernels.dense_attention.api import choose as choose
from sparse_lm.kernels.dense_attention.api import unsupported as unsupported
from sparse_lm.kernels.dense_attention.api import (
    write_and_attend as write_and_attend)
