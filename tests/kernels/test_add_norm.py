"""The sum and its norm against float64; tests/gpu has what needs a GPU."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.add_norm import add_norm, choose, unsupported

VERSION = jax.__version_info__
# Before jax 0.12 the GPU's interpret mode has one thread block.
TOKENS = 3 if VERSION >= (0, 12) else 1
ON_CPU = ["xla", pytest.param("pallas_gpu", marks=pytest.mark.skipif(
    VERSION < (0, 11), reason="needs GPU interpret mode, of jax 0.11"))]


def make(columns=768, dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  x, y = (jnp.array(rng.normal(size=(TOKENS, columns)) * s, dtype)
          for s in (3, 0.01))
  return [x, y, *(jnp.array(rng.normal(size=columns), jnp.float32)
                  for _ in range(2))]


def run(arrays, implementation):
  if implementation == "xla":
    return add_norm(*arrays, epsilon=1e-6, implementation="xla")
  with plgpu.force_gpu_interpret_mode(
      plgpu.InterpretGPUParams(detect_races=True)):
    return jax.device_get(add_norm(*arrays, epsilon=1e-6,
                                   implementation=implementation))


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


def test_what_the_kernel_cannot_take():
  x = make()[0]
  assert unsupported("xla", x) is unsupported("pallas_gpu", x) is None
  for bad, reason in ((x.astype(jnp.float32), "bfloat16, not float32"),
                      (x[:, :700], "up to 8192, not 700"),
                      (jnp.zeros((65, 768), x.dtype), "64 tokens, not 65")):
    assert reason in unsupported("pallas_gpu", bad)
    with pytest.raises(ValueError, match=reason):
      add_norm(bad, bad, *make()[2:], epsilon=1e-6,
               implementation="pallas_gpu")
  with pytest.raises(ValueError, match="'cuda' is not one of xla, pallas_gpu"):
    unsupported("cuda", x)
  assert choose(jax.devices()[0], x) == "xla"


def test_lowers_at_the_shapes_of_a_2b_model():
  x = jax.ShapeDtypeStruct((8, 2304), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((2304,), jnp.float32)
  lowered = jax.jit(lambda *a: add_norm(
      *a, epsilon=1e-6, implementation="pallas_gpu")).trace(
          x, x, scale, scale).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") == 1
