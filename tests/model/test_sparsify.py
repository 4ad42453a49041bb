"""Sparsifiers against their definitions, statistical top-k also against
Gaussians and Gemma 3n."""

import dataclasses
import json
import pathlib
import re

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sparse_lm.config import LinearInputsConfig
from sparse_lm.model.sparsify import (approx_topk, block_topk, soft_threshold,
                                      sparsify_input, statistical_threshold,
                                      statistical_topk, topk, topk_mask)

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


def largest(rows, k):
  """True for the k largest of each row, of equals the first."""
  order = np.argsort(-rows, axis=-1, kind="stable")
  mask = np.zeros(rows.shape, bool)
  np.put_along_axis(mask, order[..., :k], True, axis=-1)
  return mask


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([(1,), (7,), (2, 3, 6)]), st.data())
def test_topk_mask_is_the_first_k_of_a_stable_sort(shape, data):
  """Few different values, so that most rows have ties; -0 ties with 0."""
  k = data.draw(st.integers(1, shape[-1]))
  size = int(np.prod(shape))
  values = data.draw(st.lists(st.sampled_from([-2.5, -0.0, 0.0, 1.0, 3.0]),
                              min_size=size, max_size=size))
  x = np.array(values, np.float32).reshape(shape)
  mask = np.asarray(topk_mask(jnp.array(x), k))
  np.testing.assert_array_equal(mask, largest(x, k))
  np.testing.assert_array_equal(mask.sum(-1), k)


def rows_without_ties(*shape):
  return jax.random.normal(jax.random.key(5), shape)


def test_topk_keeps_entries_as_they_are():
  x = rows_without_ties(3, 2, 30) - 3  # Most are negative, the kept ones too.
  y = topk(x, 11)
  np.testing.assert_array_equal(y, np.where(largest(np.array(x), 11), x, 0))
  assert topk(x.astype(jnp.bfloat16), 11).dtype == jnp.bfloat16


def test_approx_topk_is_exact_on_a_cpu():
  x = rows_without_ties(3, 2, 30)
  np.testing.assert_array_equal(approx_topk(x, 7, 0.9), topk(x, 7))


def test_approx_topk_keeps_so_many_of_equals():
  counts = np.count_nonzero(approx_topk(jnp.ones((4, 20)), 7, 0.9), axis=-1)
  np.testing.assert_array_equal(counts, 7)


@pytest.mark.parametrize("k, size", [(2, 8), (1, 4), (16, 32)])
def test_block_topk_block_by_block(k, size):
  x = rows_without_ties(2, 3, 64)
  y = np.asarray(block_topk(x, k, size))
  for first in range(0, 64, size):
    block = slice(first, first + size)
    np.testing.assert_array_equal(y[..., block], topk(x[..., block], k))
  np.testing.assert_array_equal(np.count_nonzero(y, -1), 64 * k // size)


@pytest.mark.parametrize("operator", [
    lambda x: topk(x, 4), lambda x: approx_topk(x, 4, 0.9),
    lambda x: block_topk(x, 2, 8)], ids=["topk", "approx_topk", "block_topk"])
def test_exact_operators_pass_gradients_to_what_they_keep(operator):
  x = rows_without_ties(3, 16)
  weights = jnp.arange(1.0, 49).reshape(3, 16)
  grad = jax.grad(lambda x: (weights * operator(x)).sum())(x)
  np.testing.assert_array_equal(grad, np.where(operator(x) != 0, weights, 0))


@pytest.mark.parametrize("operator, kept", [
    (lambda x: topk(x, 5), [0, 1, 2, 3, 4]),
    (lambda x: block_topk(x, 2, 8), [0, 1, 8, 9])], ids=["topk", "block_topk"])
def test_gradients_of_equals_go_to_the_first(operator, kept):
  grad = jax.grad(lambda x: operator(x).sum())(jnp.full(16, 0.5))
  np.testing.assert_array_equal(np.flatnonzero(grad), kept)


TOPK = LinearInputsConfig(sparsifier="topk", active_fraction=0.4)
BLOCKS = LinearInputsConfig(sparsifier="block_topk", active_fraction=0.5)


def input_mask(x, config):
  """M of Q-Sparse: by magnitude, of all entries or of each 32."""
  x = np.abs(np.asarray(x, np.float64))
  if config.sparsifier == "block_topk":
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    return largest(blocks, 16).reshape(x.shape)
  return largest(x, round(config.active_fraction * x.shape[-1]))


def rescaled(kept):
  """What is kept over its L2 norm, times the root of the width."""
  return (kept / np.linalg.norm(kept, axis=-1, keepdims=True)
          * np.sqrt(kept.shape[-1]))


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("config", [TOPK, BLOCKS], ids=["topk", "16 of 32"])
def test_sparsify_input_equals_the_definition(config, rescale,
                                              straight_through):
  config = dataclasses.replace(config, rescale=rescale,
                               straight_through=straight_through)
  x = 5 * rows_without_ties(2, 3, 64)
  mask = input_mask(x, config)
  kept = np.where(mask, np.asarray(x, np.float64), 0)
  y = np.asarray(sparsify_input(x, config))
  np.testing.assert_allclose(y, rescaled(kept) if rescale else kept, rtol=1e-5)
  np.testing.assert_array_equal(y != 0, mask)  # Dropped to 0, not nearly.
  if rescale:
    np.testing.assert_allclose(np.square(y).mean(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("config", [TOPK, BLOCKS], ids=["topk", "16 of 32"])
def test_gradient_of_sparsify_input(config, rescale):
  """That of the masked input, by differences in float64.

  Straight through it is x's at every entry, the dropped ones included;
  without, at the kept ones alone.
  """
  x, weights = jax.random.normal(jax.random.key(6), (2, 64))
  mask = input_mask(x, config)
  masked = np.where(mask, np.asarray(x, np.float64), 0)

  def f64(kept):
    return (np.asarray(weights, np.float64)
            * (rescaled(kept) if rescale else kept)).sum()

  expected = np.array([(f64(masked + step) - f64(masked - step)) / 2e-6
                       for step in 1e-6 * np.eye(64)])

  def gradient(**keys):
    keys = dataclasses.replace(config, rescale=rescale, **keys)
    return jax.grad(lambda x: (weights * sparsify_input(x, keys)).sum())(x)

  np.testing.assert_allclose(gradient(straight_through=True), expected,
                             atol=1e-5)
  np.testing.assert_allclose(gradient(straight_through=False),
                             np.where(mask, expected, 0), atol=1e-5)
  assert np.all(np.abs(expected[~mask]) > 1e-4)


def test_sparsify_input_over_several_axes():
  """Heads and their widths are one input."""
  x = rows_without_ties(2, 3, 4, 8)
  y = sparsify_input(x, TOPK, axes=2)
  flat = sparsify_input(x.reshape(2, 3, 32), TOPK)
  np.testing.assert_array_equal(y.reshape(2, 3, 32), flat)
  counts = np.count_nonzero(y, axis=-1)
  np.testing.assert_array_equal(counts.sum(-1), 13)
  assert len(set(counts.ravel())) > 1, "not so many of each head"


def test_sparsify_input_of_zeros_is_finite():
  value, grad = jax.value_and_grad(
      lambda x: sparsify_input(x, TOPK).sum())(jnp.zeros(10))
  assert value == 0
  assert np.all(np.isfinite(grad))


def test_sparsify_input_keeps_the_type_and_measures_in_float32():
  """All lie between 1 and 2, where one rounding is 2^-8 at most."""
  x = (1 + rows_without_ties(4096) / 100).astype(jnp.bfloat16)
  y = sparsify_input(x, TOPK)
  assert y.dtype == jnp.bfloat16
  kept = np.where(input_mask(x, TOPK), np.asarray(x, np.float64), 0)
  np.testing.assert_allclose(np.asarray(y, np.float64), rescaled(kept),
                             rtol=0, atol=1.01 * 2**-8)
  assert sparsify_input(x, LinearInputsConfig()) is x


@pytest.mark.parametrize("name, f", [
    ("topk", lambda x: topk(x, 5)),
    ("approx_topk", lambda x: approx_topk(x, 5, 0.9)),
    ("block_topk", lambda x: block_topk(x, 2, 8)),
    ("inputs", lambda x: sparsify_input(
        x, LinearInputsConfig(sparsifier="topk"))),
])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_no_device_gathers_other_devices_rows(name, f, shape):
  """A sort of rows that lie on other devices would bring them all here."""
  del name
  mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  x = jax.random.normal(jax.random.key(0), (16, 4, 64))
  expected, slope = jax.value_and_grad(lambda x: jnp.sin(f(x)).sum())(x)
  rows = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
  with jax.set_mesh(mesh):
    run = jax.jit(jax.value_and_grad(lambda x: jnp.sin(f(x)).sum()),
                  in_shardings=rows, out_shardings=(None, rows))
    compiled = run.lower(x).compile()
    value, gradient = compiled(jax.device_put(x, rows))
  assert not re.search(r"\[16,4,\d+", compiled.as_text())
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
