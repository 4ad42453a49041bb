"""The GPU kernels, interpreted and lowered with no GPU at hand.

tests/gpu has what needs one.
"""

import types

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from sparse_lm.kernels.spark_attention import (choose, gpu, gpu_form,
                                               reference, spark_attention)

B, L, E, P = 1, 128, 128, 64
EVERYTHING = 2**30
HOPPER = types.SimpleNamespace(platform="gpu", compute_capability="9.0")


@pytest.fixture
def interpreted(monkeypatch):
  """Interpret mode, which has no product of an array in registers.

  Such an array goes through shared memory here. Of the ring's slots there are
  three, so that they are filled again.
  """
  kernel, operand = plgpu.kernel, None

  def with_operand(body, *, scratch_types, **options):
    def with_scratch(*refs, smem, **scratch):
      nonlocal operand
      operand = smem.at[lax.axis_index("warpgroup")]
      body(*refs, **scratch)

    smem = plgpu.SMEM((2, gpu_form.TILE, gpu_form.TILE), jnp.bfloat16)
    return kernel(with_scratch, scratch_types=scratch_types | dict(smem=smem),
                  **options)

  def accumulate(total, x, y):
    operand[...] = x
    plgpu.commit_smem()
    plgpu.wgmma(total, operand, y)

  monkeypatch.setattr(plgpu, "kernel", with_operand)
  monkeypatch.setattr(gpu, "_accumulate", accumulate)
  monkeypatch.setattr(gpu_form, "MAX_SLOTS", 3)
  jax.clear_caches()
  with plgpu.force_gpu_interpret_mode(
      plgpu.InterpretGPUParams(detect_races=True)):
    yield
  jax.clear_caches()


def make(heads, kv_heads=1, dtype=jnp.bfloat16):
  """Query, key, value, and the gradient of the output."""
  rng = np.random.default_rng(0)
  key = B, kv_heads, L, E
  query = B, kv_heads, heads // kv_heads, L, E
  return [jnp.array(rng.normal(size=shape), dtype)
          for shape in (query, key, key, query)]


def run(attend, arrays, *rest):
  """Mixed values, gradients, and the two counts."""
  def f(query, key, value):
    mixed, *counts = attend(query, key, value, *rest, 0, 0)
    return mixed, counts

  mixed, pull, counts = jax.vjp(f, *arrays[:3], has_aux=True)
  return [mixed, *pull(arrays[3])], counts


@pytest.mark.skipif(jax.__version_info__ < (0, 12),
                    reason="needs blocks in interpret mode, of jax 0.12")
@pytest.mark.parametrize("heads, cut, window, softcap", [
    (2, 50, 30, 3.0), (1, 0, EVERYTHING, 0.0)])
def test_against_all_scores_at_once(interpreted, heads, cut, window, softcap):
  arrays = make(heads)
  index = np.arange(L)
  positions = jnp.array(np.where(index < cut, index, index - cut))[None]
  segments = jnp.array(np.where(index < cut, 1, 2))[None] if cut else None
  options = positions, segments, jnp.int32(window), P, 12, softcap
  got, got_counts = jax.device_get(run(gpu.spark_attention, arrays, *options))
  wide = [x.astype(jnp.float32) for x in arrays]
  expected, counts = run(reference.spark_attention, wide, *options)
  for x, y in zip(got, expected):
    error = np.linalg.norm(np.asarray(x, np.float64) - y)
    assert error < 6e-3 * np.linalg.norm(y)
  # Products of bfloat16 are exact in float32: the same keys are kept.
  for x, y in zip(got_counts, counts):
    np.testing.assert_array_equal(x, y)


def test_ranges_of_blocks():
  """Of four blocks of 64 tokens, two documents that meet in the second."""
  index = np.arange(4 * gpu_form.TILE)
  positions = jnp.array(np.where(index < 100, index, index - 100))[None]
  segments = jnp.array(np.where(index < 100, 1, 2))[None]
  places = gpu_form.locate(positions, segments, EVERYTHING, 2)
  first, whole_first, whole_end, end = np.asarray(places.keys)[:, 0]
  np.testing.assert_array_equal(first, [0, 0, 1, 1])
  np.testing.assert_array_equal(end, [1, 2, 3, 4])
  # Only the last queries see a block whole: the third.
  np.testing.assert_array_equal(whole_end - whole_first, [0, 0, 0, 1])
  assert (whole_first[3], whole_end[3]) == (2, 3)
  first, _, _, end = np.asarray(places.queries)[:, 0]
  np.testing.assert_array_equal(first, [0, 2])
  np.testing.assert_array_equal(end, [4, 4])
  # A window of one token: each block sees itself alone.
  places = gpu_form.locate(jnp.array(index)[None], None, 1, 2)
  first, _, _, end = np.asarray(places.keys)[:, 0]
  np.testing.assert_array_equal(end - first, 1)


def test_lowers_at_the_shapes_of_a_2b_model():
  def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)

  def both(query, key, value, d_out, positions, segments, window):
    mixed, pull = jax.vjp(lambda *arrays: spark_attention(
        *arrays, positions, segments, window, predictor_dim=128, top_k=256,
        softcap=50.0, implementation="pallas_gpu")[0], query, key, value)
    return mixed, pull(d_out)

  query, key = shape(2, 4, 2, 4096, 256), shape(2, 4, 4096, 256)
  tokens = shape(2, 4096, dtype=jnp.int32)
  lowered = jax.jit(both).trace(query, key, key, query, tokens, tokens, shape(
      dtype=jnp.int32)).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("custom_call @mosaic_gpu") == 5


def test_who_is_chosen():
  query, key, *_ = make(8, 4)
  assert choose(HOPPER, query, key, P) == "pallas_gpu"
  assert choose(jax.devices()[0], query, key, P) == "xla"
  assert choose(HOPPER, query.astype(jnp.float32), key, P) == "xla"
  assert choose(HOPPER, query[..., :100, :], key[..., :100, :], P) == "xla"
  assert choose(HOPPER, query, key, 32) == "xla"


def test_on_a_mesh_each_device_needs_its_own():
  query, key, *_ = make(8, 4)
  mesh = jax.make_mesh((2, 4), ("data", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  seen = []

  def note(query):
    seen.append(choose(HOPPER, query, key, P))
    return query

  with jax.set_mesh(mesh):
    jax.eval_shape(note, query)
    for axes in ({"tensor"}, {"data", "tensor"}):
      jax.eval_shape(jax.shard_map(
          note, in_specs=PartitionSpec(None, "tensor"),
          out_specs=PartitionSpec(None, "tensor"), axis_names=axes), query)
  assert seen == ["xla", "xla", "pallas_gpu"]


@pytest.mark.parametrize("change, message", [
    (dict(dtype=jnp.float32), "needs bfloat16, not float32"),
    (dict(length=96), "needs a multiple of 128 tokens, not 96"),
    (dict(predictor_dim=32), "head dims in multiples of 64 up to 256"),
])
def test_what_does_not_fit_is_refused(change, message):
  length = change.get("length", L)
  query, key, *_ = (x[..., :length, :] for x in make(
      2, dtype=change.get("dtype", jnp.bfloat16)))
  with pytest.raises(ValueError, match=message):
    spark_attention(query, key, key, jnp.zeros((B, length), int), None, 4,
                    predictor_dim=change.get("predictor_dim", P), top_k=3,
                    implementation="pallas_gpu")
