"""Spark attention of whole sequences, in memory linear in their length."""

from sparse_lm.kernels.spark_attention.api import (
    IMPLEMENTATIONS as IMPLEMENTATIONS)
from sparse_lm.kernels.spark_attention.api import choose as choose
from sparse_lm.kernels.spark_attention.api import (
    spark_attention as spark_attention)
from sparse_lm.kernels.spark_attention.api import unsupported as unsupported
