"""The GPU kernel, interpreted and lowered with no GPU at hand.

tests/gpu has what needs one.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.add_norm import xla as add_norm
from sparse_lm.kernels.sparse_ffn import (Elementwise, StatisticalTopk,
                                          add_norm_and_sparse_ffn, gpu,
                                          gpu_all, gpu_sums, sparse_ffn,
                                          unsupported)
from sparse_lm.kernels.sparse_ffn.gpu_scores import TILE

VERSION = jax.__version_info__
interpreted = pytest.mark.skipif(
    VERSION < (0, 11), reason="needs GPU interpret mode, of jax 0.11")
# Before jax 0.12 that mode has one thread block.
many_blocks = pytest.mark.skipif(
    VERSION < (0, 12), reason="needs more thread blocks than one")
TILES, TOKENS = (2, 3) if VERSION >= (0, 12) else (1, 1)
F, R, U, D = TILES * TILE, 256, 256, 512


def linear(x):
  return x


def keep_above_mean(score):
  """Of a whole row, so not a selection that a kernel takes in."""
  return jnp.where(score > score.mean(-1, keepdims=True), score, 0)


def make(shape, tokens=TOKENS, seed=0, neurons=F):
  """x, gate, up, down of a layer, in bfloat16."""
  rng = np.random.default_rng(seed)
  gate, up = {"spark": (R, U), "gated": (D, D), "plain": (D, None)}[shape]
  return [None if s[1] is None else jnp.array(rng.normal(size=s), jnp.bfloat16)
          for s in ((tokens, D), (neurons, gate), (neurons, up), (neurons, D))]


def formula(arrays, select, up_activation, x_up=None):
  x, gate, up, down = (None if a is None else np.asarray(a, np.float64)
                       for a in arrays)
  x_up = x if x_up is None else np.asarray(x_up, np.float64)
  scores = x[:, :gate.shape[1]] @ gate.T
  activation = np.asarray(select(jnp.asarray(scores, jnp.float32)), np.float64)
  hidden = activation
  if up is not None:
    product = x_up[:, -up.shape[1]:] @ up.T
    hidden = hidden * np.asarray(up_activation(product), np.float64)
  return hidden @ down, (activation != 0).sum(1)


def interpret(function, *arrays, **kwargs):
  params = plgpu.InterpretGPUParams(detect_races=True)
  with plgpu.force_gpu_interpret_mode(params):
    return jax.device_get(function(*arrays, **kwargs,
                                   implementation="pallas_gpu"))


def run(arrays, select, up_activation=linear):
  return interpret(sparse_ffn, *arrays, select=select,
                   up_activation=up_activation)


def close(y, expected):
  error = np.linalg.norm(np.asarray(y, np.float64) - expected)
  return error <= 4e-3 * np.linalg.norm(expected)


@interpreted
@pytest.mark.parametrize("shape, select, up_activation", [
    ("spark", StatisticalTopk(1.0, jax.nn.relu), linear),
    ("spark", StatisticalTopk(1.0, functools.partial(
        jax.nn.gelu, approximate=True), bessel=True), jnp.tanh),
    ("gated", Elementwise(jax.nn.relu), jax.nn.relu),
    ("plain", Elementwise(jax.nn.relu), linear),
    ("spark", keep_above_mean, linear),
    # None, and all.
    ("spark", Elementwise(jnp.zeros_like), linear),
    ("spark", Elementwise(linear), linear),
])
def test_against_the_formula(shape, select, up_activation):
  arrays = make(shape)
  y, active = run(arrays, select, up_activation)
  expected, count = formula(arrays, select, up_activation)
  np.testing.assert_array_equal(active, count)
  assert close(y, expected)


TOPK = StatisticalTopk(1.0, jax.nn.relu)


@interpreted
@pytest.mark.parametrize("tokens", sorted({1, TOKENS}))
def test_scores_far_from_0(tokens):
  """The threshold is right where the mean is a hundred deviations."""
  x, gate, up, down = make("spark", tokens)
  x = (x * 0.0625).at[:, 0].set(100)
  arrays = x, gate.at[:, 0].set(1), up, down
  y, active = run(arrays, TOPK)
  expected, count = formula(arrays, TOPK, linear)
  np.testing.assert_array_equal(active, count)
  assert close(y, expected)


def make_norm():
  """y, its norm's scale, the sum's."""
  rng = np.random.default_rng(7)
  return [jnp.array(rng.normal(size=(1, D)) * 0.01, jnp.bfloat16),
          *(jnp.array(rng.normal(size=D), jnp.float32) for _ in range(2))]


@interpreted
@pytest.mark.parametrize("shape, select", [
    ("spark", TOPK), ("gated", TOPK), ("plain", TOPK),
    ("spark", keep_above_mean)])
def test_with_the_norm_before_it(shape, select):
  x, *rest = make(shape, tokens=1)
  norm = make_norm()
  assert gpu.takes_in_add_norm(x, rest[0], select)
  total, y, active = interpret(add_norm_and_sparse_ffn, x, *norm, *rest,
                               epsilon=1e-6, select=select)
  expected, normed = add_norm.add_norm(x, *norm, 1e-6)
  np.testing.assert_array_equal(total, expected)
  # The gate's token is rounded before the norms' factors multiply its parts.
  added, added_scale, scale = (np.asarray(a, np.float64) for a in norm)
  parts = [np.asarray(jnp.array(a * (1 + scale), jnp.bfloat16), np.float64)
           for a in (np.asarray(x, np.float64), added * (1 + added_scale))]
  added_factor, factor = (
      1 / np.sqrt((np.asarray(a, np.float64)**2).mean() + 1e-6)
      for a in (added, expected))
  token = factor * (parts[0] + added_factor * parts[1])
  expected, count = formula([token, *rest], select, linear, x_up=normed)
  np.testing.assert_array_equal(active, count)
  assert close(y, expected)


@interpreted
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows_after_the_norm(where):
  x, *rest = make("spark", tokens=1)
  arrays = [x, *make_norm()]
  arrays[where] = arrays[where].at[..., 5].set(jnp.nan)
  _, y, _ = interpret(add_norm_and_sparse_ffn, *arrays, *rest, epsilon=1e-6,
                      select=TOPK)
  assert np.isnan(np.asarray(y, np.float32)).any()


@many_blocks
@pytest.mark.parametrize("rows, kernel", [
    (1, False), (4, True), (7, True), (27, True), (64, True), (66, False),
    (84, True), (216, True), (218, False), (260, False)])
def test_partial_sums(rows, kernel):
  """What is added up is lost afterwards, and not before."""
  y = np.random.default_rng(rows).normal(size=(rows, 256))
  y = y.astype(np.float32)
  params = plgpu.InterpretGPUParams(detect_races=True)
  with plgpu.force_gpu_interpret_mode(params):
    total = gpu_sums.add_up(jnp.array(y), jnp.dtype(jnp.float32))
  np.testing.assert_allclose(total, y.astype(np.float64).sum(0), atol=1e-4)
  text = str(jax.make_jaxpr(lambda y: gpu_sums.add_up(y, y.dtype))(y))
  assert ("add_partial_sums" in text) == kernel


@interpreted
def test_rows_come_in_batches_of_any_size(monkeypatch):
  """Of three, and more active neurons in a block than two batches hold."""
  monkeypatch.setattr(gpu, "_ROWS_BYTES", 2 * 2 * (4 * U + 3 * D))
  jax.clear_caches()
  arrays = make("spark", seed=1)
  for select in (Elementwise(jax.nn.relu), Elementwise(linear)):
    y, active = run(arrays, select)
    expected, count = formula(arrays, select, linear)
    np.testing.assert_array_equal(active, count)
    assert active.min() > 10 and close(y, expected)
  jax.clear_caches()


ABOVE_20 = Elementwise(lambda s: jnp.where(s > 20, s, 0))


def poison_idle(arrays, select, x=None):
  """`up` and `down` with NaN for neurons that no token activates."""
  x, gate, up, down = arrays if x is None else (x, *arrays[1:])
  scores = np.asarray(x, np.float32)[:, :R] @ np.asarray(gate, np.float32).T
  idle_F = np.asarray(select(jnp.asarray(scores)) == 0).all(0)
  assert 0 < (~idle_F).sum() < F / 2
  return [jnp.where(idle_F[:, None], jnp.nan, a) for a in (up, down)]


@interpreted
@pytest.mark.parametrize("tokens, select", [
    (1, ABOVE_20), (1, TOPK), (TOKENS, ABOVE_20), (TOKENS, TOPK)])
def test_rows_of_inactive_neurons_are_not_read(tokens, select):
  arrays = make("spark", tokens, seed=2)
  expected, active = run(arrays, select)
  assert active.min() > 0
  y, _ = run([*arrays[:2], *poison_idle(arrays, select)], select)
  np.testing.assert_array_equal(y, expected)


@interpreted
def test_nor_are_they_after_the_norm():
  x, *rest = make("spark", tokens=1)
  norm = make_norm()
  call = functools.partial(interpret, add_norm_and_sparse_ffn, x, *norm,
                           epsilon=1e-6, select=TOPK)
  _, expected, active = call(*rest)
  assert active[0] > 0
  _, normed = add_norm.add_norm(x, *norm, 1e-6)
  _, y, _ = call(rest[0], *poison_idle([x, *rest], TOPK, normed))
  np.testing.assert_array_equal(y, expected)


@interpreted
@pytest.mark.parametrize("select", [
    Elementwise(lambda s: jnp.where(s > 2, s, 0)), TOPK])
def test_ties_at_the_threshold_are_inactive(select):
  """Scores of 0 and 2: their mean is 1, and so is their deviation."""
  x, gate, up, down = make("spark", tokens=1)
  x = x.at[0, :R].set(jnp.arange(R) == 0)
  gate = gate.at[:, 0].set(jnp.arange(F) % 2 * 2)
  y, active = run([x, gate, up, down], select)
  assert active[0] == 0 and not y.any()
  y, active = run([x, gate.at[5, 0].set(9), up, down], select)
  assert active[0] == 1 and y.all()


@interpreted
@pytest.mark.parametrize("tokens, select, bad", [
    (1, Elementwise(linear), np.nan), (1, Elementwise(linear), np.inf),
    (TOKENS, StatisticalTopk(-9.0, linear), np.nan)])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows(tokens, select, bad, where):
  arrays = make("spark", tokens)
  arrays[where] = arrays[where].at[0, -1].set(bad)
  y, _ = run(arrays, select)
  assert not np.isfinite(np.asarray(y[0], np.float32)).all()


GELU = functools.partial(jax.nn.gelu, approximate=True)


@many_blocks
@pytest.mark.parametrize("shape, neurons, tokens, select, up_activation", [
    ("spark", 256, 20, StatisticalTopk(1.0, jax.nn.relu), linear),
    ("spark", 192, 9, StatisticalTopk(1.0, GELU, bessel=True), jnp.tanh),
    ("gated", 192, 16, Elementwise(jax.nn.relu), jax.nn.relu),
    ("plain", 256, 12, StatisticalTopk(1.0, jax.nn.relu), linear),
    ("plain", 128, 64, Elementwise(jax.nn.relu), linear),
    ("spark", 192, 9, keep_above_mean, linear),
    # None, and all.
    ("spark", 128, 9, Elementwise(jnp.zeros_like), linear),
    ("spark", 128, 9, Elementwise(linear), linear),
])
def test_many_tokens_against_the_formula(shape, neurons, tokens, select,
                                         up_activation):
  arrays = make(shape, tokens, neurons=neurons)
  y, active = run(arrays, select, up_activation)
  expected, count = formula(arrays, select, up_activation)
  np.testing.assert_array_equal(active, count)
  assert close(y, expected)


@many_blocks
@pytest.mark.parametrize("blocks", [4, 8])
def test_many_tokens_with_little_shared_memory(monkeypatch, blocks):
  """Places are filled again; of three tiles, blocks add all, or one and two."""
  monkeypatch.setattr(gpu_all, "_SHARED_BYTES", 90 * 1024)
  monkeypatch.setattr(gpu_all.mosaic_gpu, "PROCESSORS", blocks)
  jax.clear_caches()
  arrays = make("gated", 10, neurons=192)
  y, _ = run(arrays, Elementwise(jax.nn.relu))
  assert close(y, formula(arrays, Elementwise(jax.nn.relu), linear)[0])
  jax.clear_caches()


@many_blocks
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows_in_its_tokens(where):
  arrays = make("spark", tokens=9, neurons=128)
  arrays[where] = arrays[where].at[0, -1].set(jnp.nan)
  y, _ = run(arrays, Elementwise(linear))
  nan_B = np.isnan(np.asarray(y, np.float32)).any(1)
  np.testing.assert_array_equal(nan_B, [True] + [where > 0] * 8)


@pytest.mark.parametrize("tokens, width, columns, select", [
    (1, 2304, 1024, StatisticalTopk(1.4, GELU)),
    (9, 2304, 1024, StatisticalTopk(1.4, GELU)),
    (32, 2304, 1024, StatisticalTopk(1.4, GELU)),
    (64, 2304, 1024, StatisticalTopk(1.4, jax.nn.silu)),
    (1, 2304, 2304, Elementwise(jax.nn.relu)),  # gated
    (32, 2304, 2304, Elementwise(jax.nn.relu)),
    (64, 4096, 1792, StatisticalTopk(1.4, GELU)),
    # Rows so long that a block is alone on its multiprocessor.
    (8, 4096, 1792, StatisticalTopk(1.4, GELU)),
    (1, 4096, 4096, Elementwise(jax.nn.relu)),
])
def test_lowers_at_the_shapes_of_large_models(tokens, width, columns, select):
  rest = width if columns == width else width - columns
  arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (
      (tokens, width), (13824, columns), (13824, rest), (13824, width))]
  assert not unsupported("pallas_gpu", *arrays, select)
  lowered = jax.jit(functools.partial(
      sparse_ffn, select=select, implementation="pallas_gpu")).trace(
          *arrays).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()


def test_a_norm_is_taken_in_where_it_fits():
  """Rows of 8,192 numbers do not, beside the gate's; nothing fails."""
  token = jax.ShapeDtypeStruct((1, 8192), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((8192,), jnp.float32)
  gate = down = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
  assert not gpu.takes_in_add_norm(token, gate, TOPK)
  lowered = jax.jit(functools.partial(
      add_norm_and_sparse_ffn, epsilon=1e-6, select=TOPK, up_FxU=None,
      implementation="pallas_gpu")).trace(
          token, token, scale, scale, gate, down_FxD=down).lower(
              lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") == 3


@pytest.mark.parametrize("width", [2304, 4096])
def test_lowers_with_the_norm_before_it(width):
  token = jax.ShapeDtypeStruct((1, width), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((width,), jnp.float32)
  columns = (1024, 1280) if width == 2304 else (width, width)
  rest = [jax.ShapeDtypeStruct((13824, n), jnp.bfloat16)
          for n in (*columns, width)]
  assert not gpu.takes_in_add_norm(token, rest[0], Elementwise(jax.nn.relu))
  lowered = jax.jit(functools.partial(
      add_norm_and_sparse_ffn, epsilon=1e-6, select=TOPK,
      implementation="pallas_gpu")).trace(
          token, token, scale, scale, *rest).lower(
              lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") == 3
