"""Spark attention in blocks: against all scores at once, and its memory."""

import functools
import re

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from sparse_lm.kernels.spark_attention import spark_attention

B, K, G, E, P = 2, 2, 2, 8, 4
EVERYTHING = 2**30


def make(length, seed=0, dtype=jnp.float32):
  """Query, key, value, and the gradient of the output."""
  rng = np.random.default_rng(seed)
  shapes = [(B, K, G, length, E), *[(B, K, length, E)] * 2,
            (B, K, G, length, E)]
  return [jnp.array(rng.normal(size=shape), dtype) for shape in shapes]


def packed(length, cut):
  """Positions and segments of rows of two documents, the first of `cut`."""
  index = np.arange(length)
  positions = np.where(index < cut, index, index - cut)
  return (jnp.array(np.tile(x, (B, 1)), jnp.int32)
          for x in (positions, np.where(index < cut, 1, 2)))


@functools.partial(jax.jit, static_argnames=(
    "window", "top_k", "softcap", "block_q", "block_k", "implementation"))
def run(arrays, positions, segments=None, traced_window=None, *,
        window=EVERYTHING, top_k=3, **options):
  """Mixed values, gradients, and the two counts."""
  window = window if traced_window is None else traced_window

  def attend(query, key, value):
    mixed, *counts = spark_attention(query, key, value, positions, segments,
                                     window, predictor_dim=P, top_k=top_k,
                                     **options)
    return mixed, counts

  mixed, pull, counts = jax.vjp(attend, *arrays[:3], has_aux=True)
  return mixed, pull(arrays[3]), counts


def whole(arrays, *places, **options):
  return run(arrays, *places, **options, implementation="reference")


def assert_close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      x, y, atol=tolerance, rtol=tolerance), a, b)


@hypothesis.given(
    length=st.sampled_from([1, 13, 24]), block_q=st.sampled_from([5, 8, 64]),
    block_k=st.sampled_from([6, 8, 64]), cut=st.sampled_from([0, 7]),
    window=st.sampled_from([1, 4, EVERYTHING]), traced=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]), top_k=st.sampled_from([1, 3, 100]))
@hypothesis.settings(deadline=None, max_examples=10)
def test_equals_all_scores_at_once(length, block_q, block_k, cut, window,
                                   traced, softcap, top_k):
  arrays, (positions, segments) = make(length, length), packed(length, cut)
  segments = segments if cut else None
  options = dict(window=window, softcap=softcap, top_k=top_k)
  expected = whole(arrays, positions, segments, **options)
  got = run(arrays, positions, segments, jnp.int32(window) if traced else None,
            **options, block_q=block_q, block_k=block_k)
  assert_close(got, expected)


@pytest.mark.parametrize("blocks", [(16, 16), (8, 32)])
def test_bfloat16_is_near_float32(blocks):
  arrays, (positions, _) = make(48, dtype=jnp.bfloat16), packed(48, 0)
  expected = whole([x.astype(jnp.float32) for x in arrays], positions, top_k=8)
  got = run(arrays, positions, top_k=8, block_q=blocks[0], block_k=blocks[1])
  for x, y in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(expected[:2])):
    assert x.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(x, np.float64) - y)
    assert error < 6e-3 * np.linalg.norm(y)
  # Products of bfloat16 are exact in float32: the same keys are kept.
  assert_close(got[2], expected[2], 0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where, dim", [(0, 0), (0, P), (1, 0), (1, P), (2, 0)])
def test_what_is_not_finite_shows_where_it_is_seen(implementation, bad, where,
                                                   dim):
  """A query's own in its row, a key's from its position on at least."""
  arrays = make(13)[:3]
  # A second score of -inf is a weight of 0: let them all be above 0.
  arrays = [jnp.abs(x) for x in arrays]
  arrays[where] = arrays[where].at[0, 0, ..., 6, dim].set(bad)
  mixed = spark_attention(
      *arrays, jnp.tile(jnp.arange(13), (B, 1)), None, EVERYTHING,
      predictor_dim=P, top_k=100, block_q=4, block_k=4,
      implementation=implementation)[0]
  finite_GxL = np.isfinite(mixed).all(-1)[0, 0]
  if where == 0:
    np.testing.assert_array_equal(finite_GxL, np.tile(np.arange(13) != 6,
                                                      (G, 1)))
  assert not finite_GxL[:, 6:].any() or where == 0
  assert np.isfinite(mixed[1]).all() and np.isfinite(mixed[0, 1]).all()
  if dim == 0 and where < 2:  # What decides which keys are kept.
    mixed = spark_attention(
        *arrays, jnp.tile(jnp.arange(13), (B, 1)), None, EVERYTHING,
        predictor_dim=P, top_k=3, implementation=implementation)[0]
    assert not np.isfinite(mixed[0, 0, :, 6]).any()


def test_one_visible_key():
  """It has all the weight: softplus(its score 2) times its value."""
  query, key, value, d_out = make(12)
  (positions, _) = packed(12, 0)
  mixed, (d_query, d_key, _), _ = run(
      [query, key, value, d_out], positions, window=1, block_q=4, block_k=4)
  score = (query[..., P:] * key[:, :, None, :, P:]).sum(-1) * (E - P)**-0.5
  expected = jax.nn.softplus(score)[..., None] * value[:, :, None]
  np.testing.assert_allclose(mixed, expected, atol=1e-5)
  np.testing.assert_allclose(d_query[..., :P], 0, atol=1e-5)
  np.testing.assert_allclose(d_key[..., :P], 0, atol=1e-5)


def test_the_best_key_is_kept_whatever_the_threshold():
  """One far outlier below: the threshold exceeds every score."""
  arrays = make(24)
  arrays[0] = jnp.abs(arrays[0])
  arrays[1] = arrays[1].at[..., 0, :].set(-100)
  (positions, _) = packed(24, 0)
  got = run(arrays, positions, top_k=1, block_q=8, block_k=8)
  assert_close(got, whole(arrays, positions, top_k=1))
  attended = np.asarray(got[2][0])
  assert attended.min() == 1


def test_scores_far_from_zero():
  """A mean of hundreds of standard deviations: the same keys are kept."""
  query, key, *rest = make(40)
  arrays = [query.at[..., 0].set(100), key.at[..., 0].set(1000), *rest]
  (positions, _) = packed(40, 0)
  _, _, (attended, _) = run(arrays, positions, top_k=5, block_q=8, block_k=8)
  scores = np.einsum("bkgle,bkse->bkgls", *(
      np.asarray(x[..., :P], np.float64) for x in arrays[:2])) / P**0.5
  spread = np.std(scores[..., -1, :])
  assert scores.mean() > 1e3 * spread
  # About five of the later queries' keys, as if the mean were 0.
  assert 2 < attended[:, 10:].mean() < 8


@pytest.mark.parametrize("window, blocks", [(EVERYTHING, 10), (4, 7), (5, 7),
                                            (6, 9), (1, 4)])
def test_blocks_in_which_nothing_is_seen_are_skipped(window, blocks):
  """Of 16 in all; every loop, forward and backward, has one turn a block."""
  arrays, (positions, _) = make(16), packed(16, 0)
  jaxpr = jax.make_jaxpr(functools.partial(
      run, window=window, block_q=4, block_k=4))(arrays, positions)
  lengths = re.findall(r"\blength=(\d+)", str(jaxpr))
  assert lengths and set(lengths) == {str(blocks)}


def temporaries(length, **options):
  """Bytes of forward and backward at 4 query and 2 kv heads of 64."""
  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  query, key = shape(1, 2, 2, length, 64), shape(1, 2, length, 64)

  def loss(query, key, value):
    return jnp.sum(spark_attention(
        query, key, value, jnp.arange(length)[None], None, EVERYTHING,
        predictor_dim=32, top_k=64, **options)[0])

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
      query, key, key).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
  short, long = (temporaries(length, block_q=128, block_k=128)
                 for length in (2048, 8192))
  assert long < 4.5 * short
  assert 16 * long < temporaries(8192, implementation="reference")


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_no_device_gathers_other_devices_rows(shape):
  mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  rows = PartitionSpec(("data", "fsdp"))
  heads = PartitionSpec(("data", "fsdp"), "tensor")

  def argument(spec, *sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype,
                                sharding=NamedSharding(mesh, spec))

  key = argument(heads, 16, K, 24, E)
  tokens = argument(rows, 16, 24, dtype=jnp.int32)
  query = argument(heads, 16, K, G, 24, E)
  with jax.set_mesh(mesh):
    compiled = run.lower([query, key, key, query], tokens, tokens,
                         jax.ShapeDtypeStruct((), jnp.int32), block_q=8,
                         block_k=8).compile()
  assert not re.search(r"\[16,\d+", compiled.as_text())


@pytest.mark.parametrize("change, message", [
    (dict(implementation="cuda"), "implementation='cuda' is not one of xla, "),
    (dict(key_BxKxLxE=jnp.zeros((B, K, 9, E))), r"key_BxKxLxE has shape"),
    (dict(positions_BxL=jnp.zeros(8, int)), r"positions_BxL has shape \(8,\)"),
    (dict(segments_BxL=jnp.zeros((B, 7), int)), "segments_BxL has shape"),
    (dict(predictor_dim=E), r"predictor_dim=8 is not in \(0, 8\)"),
    (dict(top_k=0), "top_k=0 must be above 0"),
    (dict(key_BxKxLxE=jnp.zeros((B, K, 8, E), jnp.bfloat16)),
     "key_BxKxLxE is bfloat16, expected the query's float32"),
])
def test_what_does_not_fit_is_refused(change, message):
  names = ("query_BxKxGxLxE", "key_BxKxLxE", "value_BxKxLxE")
  arguments = dict(zip(names, make(8)), positions_BxL=jnp.zeros((B, 8), int),
                   segments_BxL=None, window=4, predictor_dim=P, top_k=3)
  with pytest.raises(ValueError, match=message):
    spark_attention(**arguments | change)
