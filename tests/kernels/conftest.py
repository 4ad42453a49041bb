"""What several modules' tests compare kernels with."""

import numpy as np
import pytest
import scipy.stats


def kept_keys(scores, top_k):
  n = len(scores)
  if n <= top_k:
    return np.ones(n, bool)
  theta = scores.mean() + scores.std() * scipy.stats.norm.ppf(1 - top_k / n)
  return scores >= min(theta, scores.max())


def sparse_attention(arrays, window=2**30, top_k=6, logit_softcap=0.0):
  """In float64, by loops; whether each key is kept, (B, K, G, S), as well."""
  query, key1, key2, value = (np.asarray(a, np.float64) for a in arrays[:4])
  split, rest = key1.shape[-1], key2.shape[-1]
  y = np.zeros(query.shape)
  kept = np.zeros((*query.shape[:3], key1.shape[2]), bool)
  for b, k, g in np.ndindex(query.shape[:3]):
    length = int(arrays[4][b])
    seen = slice(max(0, length - window), length)
    scores = key1[b, k, seen] @ query[b, k, g, :split] / np.sqrt(split)
    keep = kept_keys(scores, top_k)
    kept[b, k, g, seen] = keep
    if logit_softcap:
      scores = logit_softcap * np.tanh(scores / logit_softcap)
    weights = np.where(keep, np.exp(scores), 0)
    second = key2[b, k, seen] @ query[b, k, g, split:] / np.sqrt(rest)
    weights *= np.log1p(np.exp(second)) / weights.sum()
    y[b, k, g] = weights @ value[b, k, seen]
  return y, kept


@pytest.fixture(name="formula", scope="session")
def formula_fixture():
  """Sparse attention's formula, a function."""
  return sparse_attention
