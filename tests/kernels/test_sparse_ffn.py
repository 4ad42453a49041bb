"""The sparse feed-forward kernel against float64, and what it reads."""

import functools
import types

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ACTIVATIONS
from sparse_lm.kernels.sparse_ffn import (Elementwise, StatisticalTopk, choose,
                                          sparse_ffn)
from sparse_lm.model.activations import make_activation

R, U, F, D = 6, 10, 48, 16  # of Spark: R + U = D
IMPLEMENTATIONS = ["xla", "reference"]  # those of a CPU


def select_above(threshold, scores):
  """ReLU's survivors above a threshold."""
  return jnp.where(scores > threshold, scores, 0)


def make(batch, seed=0, dtype=jnp.float32, shape="spark", neurons=F):
  rng = np.random.default_rng(seed)
  gate, up = {"spark": (R, U), "gated": (D, D), "plain": (D, None)}[shape]

  def draw(*size):
    return jnp.array(rng.normal(size=size), dtype)

  return (draw(batch, D), draw(neurons, gate),
          None if up is None else draw(neurons, up), draw(neurons, D))


def formula(arrays, threshold, up_activation=lambda x: x):
  x, gate, up, down = (
      None if a is None else np.asarray(a, np.float64) for a in arrays)
  scores = x[:, :gate.shape[1]] @ gate.T
  hidden = np.where(scores > threshold, scores, 0)
  active = (hidden != 0).sum(-1)
  if up is not None:
    hidden = hidden * up_activation(x[:, -up.shape[1]:] @ up.T)
  return hidden @ down, active


@functools.partial(jax.jit, static_argnums=(2,))
def run(arrays, threshold, implementation):
  return sparse_ffn(*arrays, select=functools.partial(select_above, threshold),
                    implementation=implementation)


@hypothesis.given(
    batch=st.sampled_from([1, 3, 8]), neurons=st.sampled_from([1, 7, 48, 77]),
    shape=st.sampled_from(["spark", "gated", "plain"]), seed=st.integers(0, 99),
    # From all active to none: both ways of the streaming one are taken.
    threshold=st.sampled_from([-1e9, -1.0, 0.0, 2.0, 5.0, 1e9]),
    implementation=st.sampled_from(IMPLEMENTATIONS))
@hypothesis.settings(deadline=None, max_examples=30)
def test_against_the_formula(batch, neurons, shape, seed, threshold,
                             implementation):
  arrays = make(batch, seed, shape=shape, neurons=neurons)
  y, active = run(arrays, threshold, implementation)
  expected, count = formula(arrays, threshold)
  np.testing.assert_allclose(y, expected, atol=1e-4)
  np.testing.assert_array_equal(active, count)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_other_branch_may_have_an_activation(implementation):
  arrays = make(2)
  y, _ = sparse_ffn(*arrays, select=functools.partial(select_above, 2.0),
                    up_activation=jax.nn.relu, implementation=implementation)
  expected, _ = formula(arrays, 2.0, lambda x: np.maximum(x, 0))
  np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("select", [
    functools.partial(select_above, 2.0), StatisticalTopk(1.0, jax.nn.relu)])
def test_ties_at_the_threshold_are_inactive(implementation, select):
  """Scores of 0 and 2: their mean is 1, and so is their deviation."""
  x, gate, up, down = make(1)
  x = x.at[0, :R].set(jnp.arange(R) == 0)
  gate = gate.at[:, 0].set(jnp.arange(F) % 2 * 2)
  y, active = sparse_ffn(x, gate, up, down, select=select,
                         implementation=implementation)
  assert active[0] == 0 and not y.any()
  # One score more: the threshold stays or rises, and it alone is above.
  y, active = sparse_ffn(x, gate.at[5, 0].set(9), up, down, select=select,
                         implementation=implementation)
  assert active[0] == 1 and y.all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_summed_in_float32(implementation):
  arrays = make(2, dtype=jnp.bfloat16)
  y, _ = run(arrays, 2.0, implementation)
  assert y.dtype == jnp.bfloat16
  expected, _ = formula(arrays, 2.0)
  error = np.linalg.norm(np.asarray(y, np.float64) - expected)
  assert error < 6e-3 * np.linalg.norm(expected)


def test_rows_of_inactive_neurons_are_not_read():
  """Whatever stands there: NaN would spread from a row that is multiplied."""
  arrays = make(2, seed=2)
  expected, active_B = run(arrays, 3.5, "xla")
  assert 2 < active_B.sum() < F / 4 and active_B.min() > 0
  x, gate, up, down = arrays
  idle_F = (np.asarray(x[:, :R] @ gate.T) <= 3.5).all(0)
  poisoned = (x, gate, jnp.where(idle_F[:, None], jnp.nan, up),
              jnp.where(idle_F[:, None], jnp.nan, down))
  y, _ = run(poisoned, 3.5, "xla")
  np.testing.assert_array_equal(y, expected)


def test_with_most_neurons_active_whole_matrices_are_multiplied():
  arrays = make(1)
  x, gate, up, down = arrays
  scores = x[:, :R] @ gate.T
  poisoned = (x, gate, up, down.at[int(scores.argmin())].set(jnp.nan))
  lowest = float(scores.min())
  y, active = run(poisoned, lowest, "xla")
  assert active[0] == F - 1
  assert np.isnan(y).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows(implementation, where, bad):
  arrays = list(make(2))
  arrays[where] = arrays[where].at[(0, 0)].set(bad)
  # All are active: whatever holds it is used.
  y, _ = sparse_ffn(*arrays, select=lambda scores: scores,
                    implementation=implementation)
  assert not np.isfinite(y[0]).all()
  # A token's own shows in its own row, a weight's in all.
  assert np.isfinite(y[1]).all() == (where == 0)


@pytest.mark.parametrize("change, message", [
    (dict(implementation="cuda"), "implementation='cuda' is not one of xla, "),
    (dict(down_FxD=jnp.zeros((F + 1, D))), r"down_FxD has shape \(49, 16\)"),
    (dict(up_FxU=jnp.zeros((U, F))), r"up_FxU has shape \(10, 48\), expected"),
    (dict(gate_FxR=jnp.zeros((F, D + 1))), "gate_FxR has shape"),
])
def test_what_does_not_fit_is_refused(change, message):
  names = ("x_BxD", "gate_FxR", "up_FxU", "down_FxD")
  arguments = dict(zip(names, make(1)), select=jax.nn.relu) | change
  with pytest.raises(ValueError, match=message):
    sparse_ffn(**arguments)


def shapes(batch, dtype=jnp.bfloat16, columns=1024):
  """Of a Spark layer of Gemma-2 2B."""
  return [jax.ShapeDtypeStruct(shape, dtype) for shape in (
      (batch, 2304), (13824, columns), (13824, 2304 - columns), (13824, 2304))]


@pytest.mark.parametrize("platform, capability, arrays, expected", [
    ("cpu", None, shapes(1), "xla"), ("cpu", None, shapes(64), "xla"),
    ("gpu", "9.0", shapes(1), "pallas_gpu"),
    ("gpu", "9.0", shapes(64), "pallas_gpu"), ("gpu", "9.0", shapes(65), None),
    ("gpu", "9.0", shapes(1, jnp.float32), None),
    ("gpu", "9.0", shapes(1, columns=1000), None),
    # T4, Blackwell, and another maker's.
    ("gpu", "7.5", shapes(1), None), ("gpu", "10.0", shapes(1), None),
    ("gpu", "gfx942", shapes(1), None),
    # Compiled, but not timed yet.
    ("tpu", None, shapes(1), None),
])
def test_the_choice_is_by_device_and_shape(platform, capability, arrays,
                                           expected):
  device = types.SimpleNamespace(platform=platform)
  if capability:
    device.compute_capability = capability
  assert choose(device, *arrays, select=jax.nn.relu) == expected


@pytest.mark.parametrize("name", [*ACTIVATIONS, "linear"])
def test_the_choice_is_by_activation(name):
  """What is chosen lowers; "gelu" is made of what GPU kernels have not."""
  activation = make_activation(name, 0.5)
  device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
  for select, up in ((Elementwise(activation), jax.nn.relu),
                     (StatisticalTopk(1.0, jax.nn.relu), activation)):
    for batch in (1, 2, 9):
      options = dict(select=select, up_activation=up)
      name_of_kernel = choose(device, *shapes(batch), **options)
      assert name_of_kernel == (None if name == "gelu" else "pallas_gpu")
      run = jax.jit(functools.partial(sparse_ffn, **options,
                                      implementation="pallas_gpu"))
      if name == "gelu":
        with pytest.raises(ValueError, match="'pallas_gpu': has no .*erf"):
          run.trace(*shapes(batch))
      else:
        run.trace(*shapes(batch)).lower(lowering_platforms=("cuda",))
  # A rule of whole rows is XLA's work, and may be anything.
  assert choose(device, *shapes(1), jnp.sort) == "pallas_gpu"


@pytest.mark.parametrize("arrays, message", [
    (shapes(1, jnp.float32), "needs bfloat16, not float32"),
    ([*shapes(1)[:3], *shapes(1, jnp.float32)[3:]],
     "needs bfloat16, not bfloat16 and float32"),
    (shapes(65), "serves 1 to 64 tokens, not 65"),
    (shapes(1, columns=1000), "needs R to be a multiple of 256, not 1000"),
    ([jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (
        (1, 56320), (64, 256), (64, 56064), (64, 56320))],
     "rows of 56320 numbers do not fit"),
])
def test_what_the_gpu_kernel_cannot_take_is_refused(arrays, message):
  with pytest.raises(ValueError,
                     match=f"implementation='pallas_gpu': {message}"):
    jax.eval_shape(functools.partial(sparse_ffn, select=jax.nn.relu,
                                     implementation="pallas_gpu"), *arrays)
