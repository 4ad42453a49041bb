"""The normal distribution's quantile, which thresholds are computed from."""

import numpy as np
import scipy.special


def quantile(k: float, count: np.ndarray | int) -> np.ndarray:
  """Q(1 - k/count) of N(0, 1) in float64, and -inf where count <= k."""
  return scipy.special.ndtri(np.maximum(1 - k / np.maximum(count, 1), 0))
