"""The gated top-k and its gradients against autodiff of the plain formula."""

import contextlib
import functools
import types

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.statistical_topk import choose, gated_topk
from sparse_lm.model import activations

ACTIVATIONS = [("gelu_tanh", "linear"), ("relu2", "silu"), ("silu", None)]


def make(activation, up_activation):
  """`gated_topk`'s activations, by name; None: no other branch."""
  return dict(
      activation=activations.make_activation(activation, 0.0),
      up_activation=activations.make_activation(up_activation or "linear", 0.0))


def plain(score, up, *, quantile, activation, up_activation, bessel):
  std = score.std(1, keepdims=True, ddof=bessel)
  theta = score.mean(1, keepdims=True) + quantile * std
  h = activation(jnp.maximum(score - theta, 0))
  return h if up is None else h * up_activation(up)


def plain_counts(score, up, **rest):
  """Of each row, activations that are not 0, and results."""
  return [(plain(score, x, **rest) != 0).sum(1) for x in (None, up)]


def draw(shape, with_up, dtype, mean=0.0, seed=0):
  """Scores of that mean, up, and the gradient of the result."""
  score, up, d_h = np.random.default_rng(seed).normal(size=(3, *shape))
  return [None if x is None else jnp.array(x, dtype)
          for x in (score + mean, up if with_up else None, d_h)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, score, up, d_h):
  h, pull = jax.vjp(f, score, up)
  return h, *pull(d_h)


def counts_of(f, score, up):
  """As `plain_counts`, of `gated_topk` with all but its arrays."""
  return f(score, up, return_counts=True)[1:]


def assert_close(got, expected, **tolerance):
  for a, b in zip(got, expected, strict=True):
    assert (a is None) == (b is None)
    if a is not None:
      np.testing.assert_allclose(np.asarray(a, np.float64), b, **tolerance)


@pytest.mark.parametrize("names", ACTIVATIONS)
@pytest.mark.parametrize("bessel", [False, True])
def test_equals_autodiff(names, bessel):
  rest = dict(quantile=0.7, bessel=bessel, **make(*names))
  with jax.enable_x64(True):
    arrays = draw((5, 37), names[1], jnp.float64, mean=-50.0)
    f = functools.partial(gated_topk, **rest)
    got = value_and_gradients(f, *arrays)
    expected = value_and_gradients(functools.partial(plain, **rest), *arrays)
    np.testing.assert_array_equal(counts_of(f, *arrays[:2]),
                                  plain_counts(*arrays[:2], **rest))
  assert_close(got, expected, atol=1e-10)


@hypothesis.given(
    rows=st.sampled_from([1, 4]), neurons=st.sampled_from([1, 2, 37, 512]),
    # From all active to none.
    quantile=st.sampled_from([-30.0, -1.1, 0.0, 0.7, 2.5, 30.0]),
    names=st.sampled_from(ACTIVATIONS), bessel=st.booleans(),
    seed=st.integers(0, 99))
@hypothesis.settings(deadline=None, max_examples=25)
def test_fractions_from_0_to_1(rows, neurons, quantile, names, bessel, seed):
  hypothesis.assume(neurons > 1 or not bessel)  # A deviation needs two.
  rest = dict(quantile=quantile, bessel=bessel, **make(*names))
  with jax.enable_x64(True):
    arrays = draw((rows, neurons), names[1], jnp.float64, seed=seed)
    f = functools.partial(gated_topk, **rest)
    got, counts = f(*arrays[:2]), counts_of(f, *arrays[:2])
    expected = plain(*arrays[:2], **rest)
    expected_counts = plain_counts(*arrays[:2], **rest)
  assert_close([got], [expected], atol=1e-10)
  np.testing.assert_array_equal(counts, expected_counts)
  if abs(quantile) == 30 and neurons > 1 and names[0] != "relu2":
    np.testing.assert_array_equal(counts[0], neurons * (quantile < 0))


def test_bfloat16_is_computed_in_float32():
  """But for the result's own rounding: 8 bits of mantissa."""
  score, up, _ = draw((4, 600), True, jnp.bfloat16, mean=3.0)
  rest = dict(quantile=1.0, bessel=False, **make("silu", "silu"))
  got = gated_topk(score, up, **rest)
  assert got.dtype == jnp.bfloat16
  expected = plain(score.astype(jnp.float32), up.astype(jnp.float32), **rest)
  assert_close([got], [expected], rtol=2**-8, atol=1e-5)


INTERPRETED = pytest.param("pallas_gpu", marks=pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="needs two blocks in GPU interpret mode, of jax 0.12"))


@pytest.mark.parametrize("implementation", ["xla", INTERPRETED])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", range(3))
def test_what_is_not_finite_shows_in_its_row(implementation, bad, where):
  arrays = draw((2, 512), True, jnp.bfloat16)
  # Where its neuron is active, nothing cuts it.
  arrays[0] = arrays[0].at[0, 7].set(9)
  arrays[where] = arrays[where].at[0, 7].set(bad)
  f = functools.partial(gated_topk, quantile=1.0, **make("relu", "linear"),
                        implementation=implementation)
  interpret = contextlib.nullcontext()
  if implementation == "pallas_gpu":
    interpret = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
  with interpret:
    outs = jax.device_get(value_and_gradients(f, *arrays))
  finite = [np.isfinite(np.asarray(x, np.float32)).all(1) for x in outs]
  assert all(x[1] for x in finite)
  # The gradient's own does not reach the result, nor up what multiplies it.
  assert not finite[0][0] or where == 2
  assert not finite[1][0]
  assert not finite[2][0] or where == 1


@pytest.mark.parametrize("score, up, message", [
    ((2, 512), (1, 512), r"up_NxF has shape \(1, 512\), expected \(2, 512\)"),
    ((2, 512), (2, 511), "up_NxF has shape")])
@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
def test_branches_that_do_not_fit_are_refused(score, up, message,
                                              implementation):
  with pytest.raises(ValueError, match=message):
    gated_topk(jnp.zeros(score, jnp.bfloat16), jnp.zeros(up, jnp.bfloat16),
               quantile=1.0, activation=jax.nn.relu,
               implementation=implementation)


def test_what_is_0_beside_the_threshold_does_not_count():
  """A neuron is cut by its activation too, a result by the other branch."""
  arrays = draw((6, 99), True, jnp.float32)[:2]
  rest = dict(quantile=0.5, bessel=False, up_activation=jax.nn.relu,
              activation=activations.make_activation("fatrelu", 0.4))
  active, nonzero = counts_of(functools.partial(gated_topk, **rest), *arrays)
  np.testing.assert_array_equal([active, nonzero],
                                plain_counts(*arrays, **rest))
  above = plain_counts(*arrays, **rest | make("relu", "relu"))[0]
  assert (0 < nonzero).all() and (nonzero < active).all() and (
      active < above).all()


def test_rows_of_equal_entries_have_finite_gradients():
  f = functools.partial(gated_topk, quantile=1.4, implementation="xla",
                        **make("gelu_tanh", "linear"))
  outs = value_and_gradients(f, *[jnp.full((2, 9), 0.1)] * 3)
  assert all(np.all(np.isfinite(x)) for x in outs)


def test_two_numbers_a_row_are_stored_beside_the_arguments():
  score, up, _ = draw((8, 500), True, jnp.bfloat16)
  f = functools.partial(gated_topk, quantile=1.4, **make("silu", "silu"))
  _, pull = jax.vjp(f, score, up)
  shapes = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(pull))
  assert shapes == [((8,), "float32")] * 2 + [((8, 500), "bfloat16")] * 2


@pytest.mark.skipif(jax.__version_info__ < (0, 11),
                    reason="no interpreter of GPU kernels before")
@pytest.mark.parametrize("names", ACTIVATIONS)
def test_pallas_gpu_interpreted(names):
  blocks = 2 if jax.__version_info__ >= (0, 12) else 1
  arrays = draw((blocks, 2048), names[1], jnp.bfloat16, mean=1.0)
  rest = dict(quantile=1.4, bessel=False, **make(*names))
  f = functools.partial(gated_topk, **rest, implementation="pallas_gpu")
  with plgpu.force_gpu_interpret_mode(
      plgpu.InterpretGPUParams(detect_races=True)):
    got = jax.block_until_ready(value_and_gradients(f, *arrays))
    counts = jax.block_until_ready(counts_of(f, *arrays[:2]))
  wide = [x if x is None else x.astype(jnp.float32) for x in arrays]
  np.testing.assert_array_equal(counts, plain_counts(*wide[:2], **rest))
  expected = value_and_gradients(functools.partial(plain, **rest), *wide)
  # The score's gradient is rounded twice, the first time with theta fixed.
  assert_close(got, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("names", [*ACTIVATIONS, ("fatrelu", "relu")])
def test_pallas_gpu_lowers(names):
  """At Gemma-2 2B's shapes, which needs no GPU."""
  f = functools.partial(gated_topk, quantile=1.4, **make(*names),
                        implementation="pallas_gpu")
  row = jax.ShapeDtypeStruct((8192, 13_824), jnp.bfloat16)
  value_and_gradients.trace(f, row, row if names[1] else None, row).lower(
      lowering_platforms=("cuda",))


def test_what_cannot_be_served():
  def call(shape=(2, 512), dtype=jnp.bfloat16, implementation="pallas_gpu",
           activation=jax.nn.gelu):
    row = jnp.zeros(shape, dtype)
    gated_topk(row, row, quantile=1.0, activation=activation,
               implementation=implementation)

  for case, message in [(dict(shape=(2, 500)), "multiple of 512"),
                        (dict(dtype=jnp.float32), "needs bfloat16"),
                        (dict(activation=jnp.sort), "has no .*sort"),
                        (dict(implementation="cuda"), "not one of xla")]:
    with pytest.raises(ValueError, match=message):
      call(**case)


@pytest.mark.parametrize("platform, capability, neurons, expected", [
    ("cpu", "", 512, "xla"), ("gpu", "9.0", 512, "pallas_gpu"),
    ("gpu", "9.0", 500, "xla"), ("gpu", "8.0", 512, "xla"),
    ("gpu", "10.0", 512, "xla"), ("tpu", "", 512, "xla")])
def test_the_choice_is_by_device_and_shape(platform, capability, neurons,
                                           expected):
  device = types.SimpleNamespace(platform=platform,
                                 compute_capability=capability)
  row = jnp.zeros((2, neurons), jnp.bfloat16)
  assert choose(device, row, row, jax.nn.gelu) == expected
