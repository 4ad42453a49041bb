"""The GPU kernel, interpreted and lowered with no GPU at hand.

tests/gpu has what needs one.
"""

import functools
from unittest import mock

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels import token_attention
from sparse_lm.kernels.sparse_attention import gpu
from sparse_lm.kernels.sparse_attention import (sparse_attention, unsupported,
                                                write_and_attend)

VERSION = jax.__version_info__
interpreted = pytest.mark.skipif(
    VERSION < (0, 12),
    reason="needs clusters in GPU interpret mode, of jax 0.12")
# More queries than a block adds up at a time.
LENGTHS, SLOTS, HEADS, GROUP = (128, 1), 128, 2, 3
EVERYTHING = 2**30
P, E = 128, 256


def make(lengths=LENGTHS, slots=SLOTS, heads=HEADS, group=GROUP, seed=0):
  rng = np.random.default_rng(seed)
  b = len(lengths)
  shapes = ((b, heads, group, E), (b, heads, slots, P),
            (b, heads, slots, E - P), (b, heads, slots, E))
  return [*(jnp.array(rng.normal(size=s), jnp.bfloat16) for s in shapes),
          jnp.array(lengths, jnp.int32)]


def run(call, *arrays, **options):
  params = plgpu.InterpretGPUParams(detect_races=True)
  with (plgpu.force_gpu_interpret_mode(params),
        # It is quicker with fewer, and has no more than eight in a cluster.
        mock.patch.object(token_attention, "PARTS", 2)):
    return jax.device_get(call(*arrays, **options))


def attend(arrays, window=EVERYTHING, top_k=12, logit_softcap=0.0):
  return run(sparse_attention, *arrays, window=window, top_k=top_k,
             logit_softcap=logit_softcap, implementation="pallas_gpu")


def close(y, expected):
  error = np.linalg.norm(np.asarray(y, np.float64) - expected)
  return error <= 4e-3 * np.linalg.norm(expected)


# Keys are copied once it is known that they are wanted, but for first parts
# where all have a place; or all are copied before. Blocks, and bytes.
TIGHT, LAZY, EAGER = (1, 26 * 1024), (1, 96 * 1024), (2, 96 * 1024)


@pytest.fixture(params=[TIGHT, LAZY, EAGER], ids=["tight", "lazy", "eager"])
def cluster(request, monkeypatch):
  size, first_parts = request.param
  monkeypatch.setattr(gpu, "_cluster_size", lambda *_: size)
  monkeypatch.setattr(gpu, "_FIRST_PARTS", first_parts)
  gpu._call.clear_cache()
  yield
  gpu._call.clear_cache()


@interpreted
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("cluster, window, top_k, logit_softcap", [
    (LAZY, EVERYTHING, 12, 0.0), (TIGHT, 40, 12, 2.0), (EAGER, 40, 12, 2.0),
    # The best alone, and all.
    (EAGER, EVERYTHING, 1, 0.0), (LAZY, 100, 1000, 50.0),
    (EAGER, 100, 1000, 50.0),
], indirect=["cluster"])
def test_against_the_formula(formula, capfd, window, top_k, logit_softcap):
  arrays = make()
  # A query that points away from all keys, one that scores them high.
  arrays[0] = arrays[0].at[0, 0, 0].multiply(-8.0)
  y, count = attend(arrays, window, top_k, logit_softcap)
  expected, kept = formula(arrays, window, top_k, logit_softcap)
  np.testing.assert_array_equal(count, kept.sum(-1))
  assert close(y, expected)
  assert "RACE" not in "".join(capfd.readouterr())


@interpreted
@pytest.mark.usefixtures("cluster")
def test_only_kept_keys_matter(formula):
  """NaN in any other slot does not show: beyond the row's end, before the
  window, and what no query of the group keeps."""
  arrays = make(seed=1)
  expected, count = attend(arrays, 90)
  kept = formula(arrays, 90, 12)[1].any(2)[..., None]
  slots, lengths = np.arange(SLOTS), np.array(LENGTHS)[:, None]
  seen = (slots < lengths) & (slots >= lengths - 90)
  query, key1, key2, value, lengths = arrays
  poisoned = [query, jnp.where(seen[:, None, :, None], key1, jnp.nan),
              jnp.where(kept, key2, jnp.nan), jnp.where(kept, value, jnp.nan),
              lengths]
  y, poisoned_count = attend(poisoned, 90)
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(poisoned_count, count)


@interpreted
@pytest.mark.usefixtures("cluster")
def test_ties_are_all_kept(formula):
  arrays = make(lengths=(70,), slots=96, heads=1, group=2)
  arrays[1] = jnp.broadcast_to(arrays[1][:, :, :1], arrays[1].shape)
  y, count = attend(arrays, top_k=3)
  np.testing.assert_array_equal(count, 70)
  assert close(y, formula(arrays, top_k=1000)[0])


@interpreted
@pytest.mark.parametrize("where", range(4))
def test_nan_in_nan_out(where):
  arrays = make(lengths=(50,), slots=64, heads=1, group=1)
  arrays[where] = arrays[where].at[0, 0, 0, 5].set(jnp.nan)
  y, _ = attend(arrays, top_k=1000 if where else 12)
  assert np.isnan(np.asarray(y, np.float32)).any()


def turned(x, positions):
  """Rotary positions of both halves of the last axis, base 100, in float64."""
  halves = []
  for part in np.split(np.asarray(x, np.float64), [P], -1):
    a, b = np.split(part, 2, -1)
    n = a.shape[-1]
    angle = positions[:, None, None] * 100.0 ** (-np.arange(n) / n)
    cos, sin = np.cos(angle), np.sin(angle)
    halves += [a * cos - b * sin, b * cos + a * sin]
  return np.concatenate(halves, -1)


@interpreted
@pytest.mark.usefixtures("cluster")
def test_a_token_is_written_and_attends(formula, capfd):
  *_, key1, key2, value, lengths = make(seed=2)
  rng = np.random.default_rng(3)
  b, positions = len(LENGTHS), np.array(LENGTHS) - 1
  queries = HEADS * GROUP
  rows = jnp.array(rng.normal(size=(b, queries + 2 * HEADS, E)), jnp.bfloat16)
  angle = np.concatenate(
      [positions[:, None] * 100.0 ** (-np.arange(n) / n)
       for n in (P // 2, (E - P) // 2)], -1)
  rotary = jnp.array(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)
  y, count, caches = run(
      write_and_attend, rows, rotary, key1, key2, value, lengths,
      window=EVERYTHING, top_k=12, implementation="pallas_gpu")
  placed = turned(rows[:, :queries + HEADS], positions)
  new = (placed[:, queries:, :P], placed[:, queries:, P:],
         rows[:, queries + HEADS:])
  written = []
  for cache, x in zip((key1, key2, value), new):
    cache = np.array(cache, np.float32)
    cache[np.arange(b), :, positions] = jnp.asarray(x, jnp.bfloat16)
    written.append(cache)
  for cache, expected in zip(caches, written):
    # An angle in float32 may round a bfloat16 to its neighbour.
    np.testing.assert_allclose(np.asarray(cache, np.float32), expected,
                               rtol=2**-7, atol=1e-5)
  query = jnp.asarray(placed[:, :queries], jnp.bfloat16)
  arrays = [query.reshape(b, HEADS, GROUP, E), *caches, lengths]
  expected, kept = formula(arrays, top_k=12)
  assert np.abs(count - kept.sum(-1)).max() <= 1
  assert close(y, expected)
  assert "RACE" not in "".join(capfd.readouterr())


@interpreted
def test_a_token_beyond_the_slots_is_not_written():
  *_, key1, key2, value, _ = make(lengths=(64,), slots=64, heads=1, group=1)
  rows, rotary = jnp.ones((1, 3, E), jnp.bfloat16), jnp.ones((1, 2, E // 2))
  _, _, caches = run(
      write_and_attend, rows, rotary, key1, key2, value, jnp.array([65]),
      window=EVERYTHING, top_k=12, implementation="pallas_gpu")
  for cache, before in zip(caches, (key1, key2, value)):
    np.testing.assert_array_equal(cache, before)


@pytest.mark.parametrize("batch, slots", [
    (1, 256), (1, 1088), (1, 4160), (8, 1088), (8, 32768)])
def test_lowers_at_the_shapes_of_a_2b_model(batch, slots):
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  shapes = [bf16((batch, 4, *s)) for s in (
      (2, 256), (slots, 128), (slots, 128), (slots, 256))]
  assert unsupported("pallas_gpu", *shapes) is None
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
  options = dict(window=4096, top_k=256, logit_softcap=50.0,
                 implementation="pallas_gpu")
  lowered = jax.jit(functools.partial(
      write_and_attend, **options)).trace(
          bf16((batch, 16, 256)),
          jax.ShapeDtypeStruct((batch, 2, 128), jnp.float32), *shapes[1:],
          lengths).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("change, reason", [
    (dict(slots=100), "100 slots are not a multiple of 16"),
    (dict(group=9), "serves 8 queries a group and 64 rows, not 9 and 1"),
    (dict(lengths=(1,) * 65), "not 1 and 65"),
    (dict(slots=64 * 2048),
     "scores of 131072 slots and 1 queries do not fit in shared memory"),
])
def test_what_it_cannot_serve(change, reason):
  options = dict(lengths=(64,), slots=64, heads=1, group=1) | change
  assert reason in unsupported("pallas_gpu", *make(**options)[:4])


def test_types_and_widths_that_it_cannot_serve():
  arrays = make(lengths=(64,), slots=64, heads=1, group=1)[:4]
  wide = [a.astype(jnp.float32) for a in arrays]
  assert "needs bfloat16, not float32" in unsupported("pallas_gpu", *wide)
  narrow = [a[..., :64] for a in arrays]
  assert "P of 64 is not" in unsupported("pallas_gpu", *narrow)
