"""Statistical top-k's backward pass by hand against autodiff's."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.statistical_topk import statistical_topk
from sparse_lm.model.sparsify import soft_threshold, statistical_threshold


def plain(x, k, bessel, huber_delta):
  theta = statistical_threshold(x, k, bessel=bessel)
  return soft_threshold(x.astype(theta.dtype), theta,
                        huber_delta).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def value_and_gradient(f, x, gradient, k, bessel, huber_delta):
  y, pull = jax.vjp(lambda x: f(x, k, bessel, huber_delta), x)
  return y, *pull(gradient)


def draw(shape, seed, mean=0.0):
  """Entries of that mean, and a gradient."""
  x, gradient = np.random.default_rng(seed).normal(size=(2, *shape))
  return x + mean, gradient


@hypothesis.given(
    shape=st.sampled_from([(2,), (1, 7), (3, 2, 40), (4, 333)]),
    share=st.sampled_from([0.02, 0.3, 0.9]), bessel=st.booleans(),
    huber_delta=st.sampled_from([0.0, 0.5]), mean=st.sampled_from([0.0, -50.0]))
@hypothesis.settings(deadline=None, max_examples=15, derandomize=True)
def test_equals_autodiff(shape, share, bessel, huber_delta, mean):
  rest = (share * shape[-1], bessel, huber_delta)
  x, gradient = draw(shape, 0, mean)
  with jax.enable_x64(True):
    expected = value_and_gradient(plain, jnp.array(x), jnp.array(gradient),
                                  *rest)
    got = value_and_gradient(statistical_topk, jnp.array(x),
                             jnp.array(gradient), *rest)
  for a, b in zip(got, expected):
    np.testing.assert_allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("huber_delta", [0.0, 0.5])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_float32(mean, huber_delta):
  """With a mean far from 0 the variance is as good."""
  x, gradient = (jnp.array(a, jnp.float32) for a in draw((16, 500), 1, mean))
  rest = (40, False, huber_delta)
  with jax.enable_x64(True):
    expected = value_and_gradient(plain, x.astype(jnp.float64),
                                  gradient.astype(jnp.float64), *rest)
  got = value_and_gradient(statistical_topk, x, gradient, *rest)
  # At 300 float32 has steps of 3e-5.
  for a, b in zip(got, expected):
    np.testing.assert_allclose(a, b, atol=2e-6 + 1e-6 * mean)


def test_bfloat16():
  """The result is rounded once: all before is float32 of the same entries."""
  x, gradient = (jnp.array(a, jnp.bfloat16) for a in draw((8, 4096), 2))
  got = value_and_gradient(statistical_topk, x, gradient, 328, False, 0.0)
  exact = value_and_gradient(plain, x.astype(jnp.float32),
                             gradient.astype(jnp.float32), 328, False, 0.0)
  for a, b in zip(got, exact):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8,
                               atol=2e-5)


def test_rows_of_equal_entries_have_finite_gradients():
  gradient = jax.grad(lambda x: statistical_topk(x, 2).sum())(jnp.ones((2, 9)))
  assert np.all(np.isfinite(gradient))


def test_nothing_of_the_rows_size_is_stored_but_themselves():
  x = jnp.array(draw((8, 500), 3)[0], jnp.bfloat16)
  _, pull = jax.vjp(lambda x: statistical_topk(x, 40), x)
  stored = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 8]
  assert len(stored) == 1 and stored[0].dtype == jnp.bfloat16
  np.testing.assert_array_equal(stored[0], x)
