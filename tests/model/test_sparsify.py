"""Statistical top-k against its definition, Gaussians and Gemma 3n."""

import json
import pathlib

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sparse_lm.model.sparsify import (soft_threshold, statistical_threshold,
                                      statistical_topk)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gemma3n_topk.json"


def definition(x, k, *, where=None, bessel=False):
  """max(x - theta, 0) of one row in float64, straight from the paper."""
  x = np.asarray(x, np.float64)
  counted = x if where is None else x[where]
  if k >= counted.size:
    y = x
  else:
    quantile = scipy.stats.norm.ppf(1 - k / counted.size)
    theta = counted.mean() + counted.std(ddof=int(bessel)) * quantile
    y = np.maximum(x - theta, 0)
  return y if where is None else np.where(where, y, 0)


@pytest.mark.parametrize("bessel", [False, True])
@pytest.mark.parametrize("d, k", [(64, 5), (1000, 80), (333, 332), (7, 7)])
def test_equals_the_definition(d, k, bessel):
  x = np.random.default_rng(d).normal(1.5, 3, size=(4, d))
  y = statistical_topk(jnp.array(x, jnp.float32), k, bessel=bessel)
  expected = [definition(row, k, bessel=bessel) for row in x]
  np.testing.assert_allclose(y, expected, atol=2e-5)


def test_any_axis():
  x = jax.random.normal(jax.random.key(0), (5, 40, 3))
  np.testing.assert_allclose(
      statistical_topk(x, 6, axis=1),
      statistical_topk(x.swapaxes(1, 2), 6).swapaxes(1, 2), rtol=1e-5,
      atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.data())
def test_mask_equals_the_definition_on_the_counted_entries(k, data):
  mask = np.array(data.draw(st.lists(st.booleans(), min_size=24, max_size=24)))
  x = np.random.default_rng(k).normal(size=24)
  y = statistical_topk(jnp.array(x, jnp.float32), k, where=jnp.array(mask))
  np.testing.assert_allclose(y, definition(x, k, where=mask), atol=2e-5)


@pytest.mark.parametrize("d, k", [(13_824, 1_106), (16_384, 819)])
def test_expected_count_on_gaussian_rows(d, k):
  x = 3 * jax.random.normal(jax.random.key(k), (256, d)) - 1
  counts = np.count_nonzero(statistical_topk(x, k), axis=-1)
  # One row's count has a standard deviation of about 20; the mean of 256
  # rows, 1.25. A threshold off by 0.3% of std would move it by over 5.
  assert abs(counts.mean() - k) < 5
  assert 10 < counts.std() < 30


def test_statistics_are_float32_under_bfloat16():
  x = (100 + jax.random.normal(jax.random.key(0), (8, 4096))).astype(
      jnp.bfloat16)
  theta = statistical_threshold(x, 400)
  assert theta.dtype == jnp.float32
  exact = np.asarray(x, np.float64)
  expected = exact.mean(-1) + exact.std(-1) * scipy.stats.norm.ppf(
      1 - 400 / 4096)
  np.testing.assert_allclose(theta[:, 0], expected, rtol=1e-5)
  assert statistical_topk(x, 400).dtype == jnp.bfloat16


@pytest.mark.parametrize("huber_delta", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_against_finite_differences(huber_delta, masked):
  rng = np.random.default_rng(1)
  x, direction = rng.normal(size=(2, 30))
  weights = jnp.array(rng.normal(size=30))
  where = jnp.arange(30) % 4 != 0 if masked else None

  def f(x):
    return jnp.sum(weights * statistical_topk(
        x, 8, where=where, huber_delta=huber_delta))

  with jax.enable_x64(True):
    x, step = jnp.array(x, jnp.float64), 1e-6 * direction
    numeric = (f(x + step) - f(x - step)) / 2e-6
    analytic = jax.grad(f)(x) @ direction
    np.testing.assert_allclose(analytic, numeric, rtol=1e-6)
    # The threshold moves with x: entries that it cuts have a gradient too.
    cut = (statistical_topk(x, 8, where=where) == 0)
    if masked:
      cut &= where
    assert np.all(np.asarray(jax.grad(f)(x))[np.asarray(cut)] != 0)


def test_gradient_of_constant_rows_is_finite():
  grad = jax.grad(lambda x: statistical_topk(x, 2).sum())(jnp.ones(10))
  assert np.all(np.isfinite(grad))


def test_huber_is_smooth_and_tends_to_the_plain_corner():
  x, theta = jnp.linspace(-1, 3, 401), jnp.zeros(1)
  slope = jax.vmap(jax.grad(
      lambda x: soft_threshold(x, theta, huber_delta=1.0)[0]))(x)
  np.testing.assert_allclose(slope, np.clip(x, 0, 1), atol=1e-6)
  np.testing.assert_allclose(soft_threshold(x, theta, huber_delta=1e-4),
                             np.maximum(x, 0), atol=1e-4)


def test_k_of_all_changes_nothing():
  x = jax.random.normal(jax.random.key(0), (3, 50))
  np.testing.assert_array_equal(statistical_topk(x, 50), x)
  np.testing.assert_array_equal(
      statistical_topk(x, 60, where=jnp.ones((1, 50), bool)), x)


def test_gemma_3n():
  golden = json.loads(GOLDEN.read_text())
  gate = jnp.array(golden["gate_output"], jnp.float32)
  k = (1 - golden["sparsity"]) * gate.shape[-1]
  np.testing.assert_allclose(statistical_topk(gate, k),
                             golden["topk_output"], atol=1e-6)
