"""The sum and its norm against float64; tests/gpu has what needs a GPU."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.add_norm import (add_norm, add_norm_and_project, choose,
                                        gpu_project, unsupported)

VERSION = jax.__version_info__
# Before jax 0.12 the GPU's interpret mode has one thread block.
TOKENS = 3 if VERSION >= (0, 12) else 1
ON_CPU = ["xla", pytest.param("pallas_gpu", marks=pytest.mark.skipif(
    VERSION < (0, 11), reason="needs GPU interpret mode, of jax 0.11"))]


def make(columns=768, dtype=jnp.bfloat16, tokens=TOKENS):
  rng = np.random.default_rng(0)
  x, y = (jnp.array(rng.normal(size=(tokens, columns)) * s, dtype)
          for s in (3, 0.01))
  return [x, y, *(jnp.array(rng.normal(size=columns), jnp.float32)
                  for _ in range(2))]


def run(arrays, implementation, function=add_norm):
  call = functools.partial(function, *arrays, epsilon=1e-6,
                           implementation=implementation)
  if implementation == "xla":
    return call()
  with plgpu.force_gpu_interpret_mode(
      plgpu.InterpretGPUParams(detect_races=True)):
    return jax.device_get(call())


def norm(x, scale):
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("columns", [768, 1024])
def test_against_the_formula(implementation, columns):
  arrays = make(columns)
  x, y, y_scale, scale = (np.asarray(a, np.float64) for a in arrays)
  expected = x + norm(y, y_scale)
  for a, b in zip(run(arrays, implementation), (expected,
                                                norm(expected, scale))):
    assert a.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(a, np.float64) - b, axis=-1)
    assert (error < 4e-3 * np.linalg.norm(b, axis=-1)).all()


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows(implementation, where):
  arrays = make()
  arrays[where] = arrays[where].at[..., 5].set(jnp.nan)
  for a in run(arrays, implementation):
    # The last scale is of the norm alone.
    assert np.isnan(np.asarray(a, np.float32)).any() or where == 3
  assert np.isnan(np.asarray(a, np.float32)).any()


# One thread block's rows, or what several have; two times four a warpgroup.
ROWS = [(16, 1)] + [(32, 1), (64, 2)] * (VERSION >= (0, 12))


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("rows, batches", ROWS)
def test_projection_against_the_formula(monkeypatch, implementation, rows,
                                        batches):
  monkeypatch.setattr(gpu_project, "_batches", lambda rows: batches)
  jax.clear_caches()
  arrays = make(tokens=1)
  rng = np.random.default_rng(1)
  weights = jnp.array(rng.normal(size=(rows, 768)), jnp.bfloat16)
  assert gpu_project.takes_in_rows(arrays[0], weights)
  total, product = run([*arrays, weights], implementation, add_norm_and_project)
  expected, normed = run(arrays, "xla")
  np.testing.assert_array_equal(total, expected)
  expected = (np.asarray(normed, np.float64)
              @ np.asarray(weights, np.float64).T)
  assert product.dtype == jnp.bfloat16 and product.shape == (1, rows)
  assert np.abs(product - expected).max() < 4e-3 * np.abs(expected).max()
  # What is not finite in one row shows there alone.
  weights = weights.at[rows - 1, 700].set(jnp.nan)
  _, product = run([*arrays, weights], implementation, add_norm_and_project)
  np.testing.assert_array_equal(np.isnan(np.asarray(product, np.float32))[0],
                                np.arange(rows) == rows - 1)
  jax.clear_caches()


def test_a_projection_is_taken_in_where_it_fits():
  def takes_in(tokens, rows, columns=2304, dtype=jnp.bfloat16):
    return gpu_project.takes_in_rows(
        jax.ShapeDtypeStruct((tokens, columns), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, columns), dtype))

  assert takes_in(1, 4096) and takes_in(1, 2048, 4096)
  assert not takes_in(2, 4096)
  assert not takes_in(1, 4104)  # Not whole blocks.
  assert not takes_in(1, 13824)  # Too much memory.
  assert not takes_in(1, 4096, dtype=jnp.float32)


def test_what_the_kernel_cannot_take():
  x = make()[0]
  assert unsupported("xla", x) is unsupported("pallas_gpu", x) is None
  for bad, reason in ((x.astype(jnp.float32), "bfloat16, not float32"),
                      (x[:, :700], "up to 8192, not 700"),
                      (jnp.zeros((65, 768), x.dtype), "64 tokens, not 65")):
    assert reason in unsupported("pallas_gpu", bad)
    scale = jnp.zeros(bad.shape[1])
    with pytest.raises(ValueError, match=reason):
      add_norm(bad, bad, scale, scale, epsilon=1e-6,
               implementation="pallas_gpu")
  with pytest.raises(ValueError, match="'cuda' is not one of xla, pallas_gpu"):
    unsupported("cuda", x)
  assert choose(jax.devices()[0], x) == "xla"
  for i, bad, message in (
      (1, x[:, :1], r"y_NxD is bfloat16\[\d, 1\], expected x_NxD's bfloat16"),
      (1, x.astype(jnp.float32), "y_NxD is float32"),
      (3, jnp.zeros(9), r"scale_D has shape \(9,\), expected \(768,\)")):
    arrays = make()
    arrays[i] = bad
    with pytest.raises(ValueError, match=message):
      add_norm(*arrays, epsilon=1e-6)


def test_lowers_at_the_shapes_of_a_2b_model():
  x = jax.ShapeDtypeStruct((8, 2304), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((2304,), jnp.float32)
  rows = jax.ShapeDtypeStruct((4096, 2304), jnp.bfloat16)

  def lower(function, *arrays):
    call = functools.partial(function, epsilon=1e-6,
                             implementation="pallas_gpu")
    return jax.jit(call).trace(*arrays).lower(
        lowering_platforms=("cuda",)).as_text()

  text = lower(add_norm, x, x, scale, scale)
  assert text.count("@mosaic_gpu") == 1
  one = jax.ShapeDtypeStruct((1, 2304), jnp.bfloat16)
  text = lower(add_norm_and_project, one, one, scale, scale, rows)
  assert text.count("@mosaic_gpu") == 1 and "dot_general" not in text
  text = lower(add_norm_and_project, x, x, scale, scale, rows)
  assert text.count("@mosaic_gpu") == 1 and "dot_general" in text
