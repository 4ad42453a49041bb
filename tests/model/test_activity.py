"""Measures of activations against loops over tokens in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from sparse_lm.model.activity import REPORT, Activity

B, L, F = 3, 11, 6  # No chunk below but that of 11 divides L.
NAMES = (*REPORT, "adjacent", "union_1", "union_3", "union_11", "chunk_4",
         "chunk_8", "chunk_11")
# Several documents a row, padding at the end; padding inside; all padding.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0],
                     [1, 1, 1, 0, 0, 2, 2, 2, 0, 2, 2],
                     [0] * 11])


def make(seed=0, scale=1.0):
  """Random activations: any sign, zeros at other places in each array."""
  rng = np.random.default_rng(seed)

  def draw(active):
    x = rng.normal(size=(B, L, F)) * (rng.random((B, L, F)) < active)
    return jnp.array(scale * x, jnp.float32)

  margin = 0.02 * rng.normal(size=(B, L, F))  # Sigmoids of all sizes.
  margin[:, ::4] *= 100  # Some are 0 or 1 to every digit.
  return Activity(draw(0.7), draw(0.5), draw(0.3),
                  jnp.array(margin, jnp.float32))


def tokens_of(counted_BxL):
  return [(b, t) for b in range(B) for t in range(L) if counted_BxL[b, t]]


def chunk_of(counted_BxL, b, t, length):
  """The tokens that count among those of t's chunk."""
  first = t // length * length
  return [s for s in range(first, min(first + length, L)) if counted_BxL[b, s]]


def cross_entropy(logits, target_logits):
  """Of sigmoid(logits) given the targets sigmoid(target_logits)."""
  target = scipy.special.expit(target_logits)
  return -(target * scipy.special.log_expit(logits)
           + (1 - target) * scipy.special.log_expit(-logits))


def brute_force(name, activity, counted, segments):
  """The measure's sum, one token and one neuron at a time."""
  gate, act, hidden, margin = (
      np.asarray(x, np.float64) for x in (
          activity.gate_BxLxF, activity.activation_BxLxF,
          activity.hidden_BxLxF, activity.margin_BxLxF))
  total = np.zeros(F) if name == "fired" else 0.0
  kind, _, length = name.rpartition("_")
  for b, t in tokens_of(counted):
    if name == "active_neurons":
      total += sum(x != 0 for x in act[b, t])
    elif name == "positive_gates":
      total += sum(x > 0 for x in act[b, t])
    elif name == "nonzero_hidden":
      total += sum(x != 0 for x in hidden[b, t])
    elif name == "kept_gates":
      total += sum(x != 0 for x in gate[b, t])
    elif name == "fired":
      total += [x != 0 for x in hidden[b, t]]
    elif name == "l1":
      total += sum(abs(x) for x in hidden[b, t])
    elif name == "adjacent":
      if t and counted[b, t - 1] and segments[b, t - 1] == segments[b, t]:
        total += cross_entropy(100 * margin[b, t - 1],
                               100 * margin[b, t]).mean()
    elif kind == "union":
      chunk = chunk_of(counted, b, t, int(length))
      total += sum(any(hidden[b, s, f] != 0 for s in chunk) for f in range(F))
    else:
      chunk = chunk_of(counted, b, t, int(length))
      # A token without an active neuron adds nothing.
      p = [abs(act[b, s]) / (abs(act[b, s]).sum() or 1) for s in chunk]
      total += (1 - np.prod([1 - x for x in p], axis=0)).mean()
  return total


@jax.jit
def measure_all(arrays):
  """All names in one compilation, of activations with padding."""
  return Activity(**arrays).measure(NAMES, jnp.array(SEGMENTS > 0),
                                    jnp.array(SEGMENTS))


@pytest.fixture(scope="module")
def measured():
  activity = make()
  return activity, measure_all(vars(activity))


# BlockFFN's 1e-5, which keeps logarithms finite, is left out of the formula.
TOLERANCE = {"chunk_4": 3e-4, "chunk_8": 3e-4, "chunk_11": 3e-4}


@pytest.mark.parametrize("name", NAMES)
def test_measure(measured, name):
  activity, values = measured
  assert values[name].dtype == jnp.float32
  np.testing.assert_allclose(
      values[name], brute_force(name, activity, SEGMENTS > 0, SEGMENTS),
      rtol=TOLERANCE.get(name, 2e-6))


def test_padding_does_not_count(measured):
  """Whatever is in it."""
  activity, values = measured
  padding = jnp.array(SEGMENTS == 0)[..., None]
  other = jax.tree.map(lambda x, y: jnp.where(padding, x, y),
                       vars(make(seed=1, scale=50.0)), vars(activity))
  again = measure_all(other)
  for name in NAMES:
    np.testing.assert_allclose(values[name], again[name], rtol=1e-6,
                               err_msg=name)


@pytest.mark.parametrize("name", ["adjacent", "nonzero_hidden", "union_8"])
def test_no_segments_are_one_document_a_row(name):
  activity, counted = make(), SEGMENTS > 0
  value = activity.measure([name], jnp.array(counted), None)[name]
  np.testing.assert_allclose(
      value, brute_force(name, activity, counted, np.ones((B, L))), rtol=2e-6)


def test_what_was_counted_is_not_counted_again(measured):
  """Whatever the activations are; padding does not count either way."""
  activity, values = measured
  counts = {"active_neurons": (activity.activation_BxLxF != 0).sum(-1),
            "nonzero_hidden": (activity.hidden_BxLxF != 0).sum(-1)}
  again = measure_all(dict(vars(make(seed=1)), counts=counts))
  for name in counts:
    assert again[name] == values[name] and again[name].dtype == jnp.float32
  assert again["fired"].sum() != values["fired"].sum()


def test_union_of_one_token_and_of_a_whole_row(measured):
  activity, values = measured
  assert values["union_1"] == values["nonzero_hidden"]
  fires = (np.asarray(activity.hidden_BxLxF) != 0) & (SEGMENTS > 0)[..., None]
  rows = fires.any(1).sum(-1) * (SEGMENTS > 0).sum(-1)
  assert values["union_11"] == rows.sum()


def differences(f, x, step):
  """The gradient of f at x by central differences."""
  return np.array([
      (f(x + d) - f(x - d)) / (2 * step)
      for d in step * np.eye(x.size).reshape(x.size, *x.shape)
  ]).reshape(x.shape)


def test_gradient_of_adjacent_is_of_both_sides():
  margin = 0.01 * np.random.default_rng(3).normal(size=(1, 4, 2))
  counted = jnp.ones((1, 4), bool)

  def f(margin):
    activity = Activity(margin, margin, margin, margin)
    return activity.measure(["adjacent"], counted, None)["adjacent"]

  def f64(margin):
    return sum(cross_entropy(100 * margin[0, t - 1], 100 * margin[0, t]).mean()
               for t in range(1, 4))

  np.testing.assert_allclose(jax.grad(f)(jnp.array(margin, jnp.float32)),
                             differences(f64, margin, 1e-7), rtol=1e-3)


def test_gradient_of_chunk():
  """By the formula with its 1e-5, and finite where nothing is active."""
  x = np.random.default_rng(4).normal(size=(1, 6, 5))
  x[0, 1] = 0
  counted = np.array([[True] * 5 + [False]])

  def f(x):
    activity = Activity(x, x, x, x)
    return activity.measure(["chunk_4"], jnp.array(counted), None)["chunk_4"]

  def f64(x):
    p = np.abs(x[0]) / (np.abs(x[0]).sum(-1, keepdims=True) + 1e-5)
    return sum(
        tokens * (1 - np.prod(1 - p[chunk] + 1e-5, axis=0).mean())
        for tokens, chunk in [(4, slice(0, 4)), (1, slice(4, 5))])

  grad = np.asarray(jax.grad(f)(jnp.array(x, jnp.float32)))
  assert np.all(np.isfinite(grad))
  moving = np.abs(x).sum(-1) > 0  # |x| has a corner at 0.
  np.testing.assert_allclose(grad[moving], differences(f64, x, 1e-6)[moving],
                             rtol=1e-3, atol=1e-6)
  assert np.all(grad[0, 5] == 0)
