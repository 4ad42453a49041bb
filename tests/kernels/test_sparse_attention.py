"""The sparse attention kernels against float64, and what they read."""

import dataclasses
import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import AttentionConfig
from sparse_lm.kernels.sparse_attention import (choose, sparse_attention,
                                                unsupported, write_and_attend)
from sparse_lm.model.attention import spark_weights, visible

EVERYTHING = 2**30
NAMES = ("query_BxKxGxE", "key1_BxKxSxP", "key2_BxKxSxU", "value_BxKxSxE",
         "lengths_B")
ON_CPU = ("xla", "reference")


def make(lengths=(40, 3, 25), slots=40, kv_heads=2, group=2, predictor=4,
         rest=6, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  b, e = len(lengths), predictor + rest

  def draw(*shape):
    return jnp.array(rng.normal(size=shape), dtype)

  return [draw(b, kv_heads, group, e), draw(b, kv_heads, slots, predictor),
          draw(b, kv_heads, slots, rest), draw(b, kv_heads, slots, e),
          jnp.array(lengths, jnp.int32)]


@functools.partial(jax.jit, static_argnames=("top_k", "logit_softcap",
                                             "implementation"))
def run(arrays, window=EVERYTHING, top_k=6, logit_softcap=0.0,
        implementation="xla"):
  return sparse_attention(*arrays, window=window, top_k=top_k,
                          logit_softcap=logit_softcap,
                          implementation=implementation)


@hypothesis.given(
    shape=st.sampled_from([(1, 1, 1, 1), (40, 2, 2, 3), (129, 3, 1, 1),
                           (300, 1, 4, 2)]),
    # From one key to more than there are: both ways of "xla" are taken.
    top_k=st.sampled_from([1, 2, 6, 39, 1000]), data=st.data(),
    window=st.sampled_from([1, 2, 17, EVERYTHING]),
    logit_softcap=st.sampled_from([0.0, 2.0]),
    implementation=st.sampled_from(ON_CPU), seed=st.integers(0, 99))
@hypothesis.settings(deadline=None, max_examples=20)
def test_against_the_formula(formula, shape, top_k, data, window, logit_softcap,
                             implementation, seed):
  slots, kv_heads, group, batch = shape
  lengths = data.draw(st.lists(st.integers(1, slots), min_size=batch,
                               max_size=batch))
  arrays = make(lengths, slots, kv_heads, group, seed=seed)
  y, count = run(arrays, window, top_k, logit_softcap, implementation)
  expected, kept = formula(arrays, window, top_k, logit_softcap)
  np.testing.assert_allclose(y, expected, atol=2e-5)
  np.testing.assert_array_equal(count, kept.sum(-1))


@pytest.mark.parametrize("implementation", ON_CPU)
def test_it_is_the_models_attention(implementation):
  """What a layer computes for the newest token, from the same cache."""
  arrays = make()
  query, key1, key2, value, lengths = arrays
  config = AttentionConfig(head_dim=10, predictor_dim=4, top_k=6,
                           logit_softcap=3.0)
  seen = visible(lengths[:, None] - 1, jnp.arange(40)[None], None, None, 20)
  weights, kept = spark_weights(
      query[:, :, :, None], jnp.concatenate([key1, key2], -1), seen, config)
  y, count = run(arrays, 20, 6, 3.0, implementation)
  np.testing.assert_allclose(
      y, jnp.einsum("bkgls,bkse->bkge", weights, value), atol=1e-6)
  np.testing.assert_array_equal(count, kept.sum((-1, -2)))


@pytest.mark.parametrize("implementation", [*ON_CPU, None])
def test_a_token_is_written_and_attends(formula, implementation):
  """One row's beyond the slots, which is not written."""
  *_, key1, key2, value, lengths = make(lengths=(40, 3, 41))
  rng = np.random.default_rng(1)
  rows = rng.normal(size=(3, 8, 10)).astype(np.float32)  # 4, 2 and 2
  angle = rng.normal(size=(3, 5))
  rotary = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
  y, count, caches = write_and_attend(
      *map(jnp.asarray, (rows, rotary)), key1, key2, value, lengths,
      window=30, top_k=6, implementation=implementation)
  turned = []
  for part, angles in ((rows[:, :6, :4], angle[:, :2]),
                       (rows[:, :6, 4:], angle[:, 2:])):
    n = angles.shape[1]
    z = (part[..., :n] + 1j * part[..., n:]) * np.exp(1j * angles)[:, None]
    turned += [z.real, z.imag]
  turned = np.concatenate(turned, -1)
  arrays = [jnp.asarray(turned[:, :4].reshape(3, 2, 2, 10))]
  for cache, before, new in zip(
      caches, (key1, key2, value),
      (turned[:, 4:, :4], turned[:, 4:, 4:], rows[:, 6:])):
    expected = np.array(before)
    for b, slot in ((0, 39), (1, 2)):
      expected[b, :, slot] = new[b]
    np.testing.assert_allclose(cache, expected, atol=1e-6)
    arrays.append(expected)
  expected, kept = formula([*arrays, lengths], 30, 6)
  np.testing.assert_allclose(y, expected, atol=2e-5)
  np.testing.assert_array_equal(count, kept.sum(-1))


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("top_k", [2, 30])
def test_only_kept_keys_matter(formula, implementation, top_k):
  """NaN in any other slot does not show: beyond the row's end, before the
  window, and what no query of the group keeps."""
  arrays = make(lengths=(300, 7, 190), slots=300)
  expected, count = run(arrays, 200, top_k, implementation=implementation)
  kept = formula(arrays, 200, top_k)[1].any(2)[..., None]
  slots = np.arange(300)
  seen = ((slots < arrays[4][:, None]) & (slots >= arrays[4][:, None] - 200)
          )[:, None, :, None]
  query, key1, key2, value, lengths = arrays
  poisoned = [query, jnp.where(seen, key1, jnp.nan),
              jnp.where(kept, key2, jnp.nan), jnp.where(kept, value, jnp.nan),
              lengths]
  y, poisoned_count = run(poisoned, 200, top_k, implementation=implementation)
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(poisoned_count, count)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("where", range(4))
def test_nan_in_nan_out(implementation, where):
  arrays = make(lengths=(40,))
  arrays[where] = arrays[where].at[0, 0, 0].set(jnp.nan)
  y, _ = run(arrays, top_k=1000, implementation=implementation)
  assert np.isnan(y).any()
  # Whatever decides which keys are kept shows when few are, too.
  if where < 2:
    y, _ = run(arrays, top_k=3, implementation=implementation)
    assert np.isnan(y).any()


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("where", range(4))
def test_an_infinity_shows_where_the_formula_has_it(formula, implementation,
                                                    where):
  """Of all keys: a logit of -inf has no weight, one of inf is NaN."""
  arrays = make(lengths=(40,))
  arrays[where] = arrays[where].at[0, 0, 0, 2].set(jnp.inf)
  y, _ = run(arrays, top_k=1000, implementation=implementation)
  with np.errstate(invalid="ignore"):
    expected, _ = formula(arrays, top_k=1000)
  np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
  assert not np.isfinite(expected).all() and np.isfinite(expected).any()


@pytest.mark.parametrize("implementation", ON_CPU)
def test_ties_at_the_threshold_are_all_kept(formula, implementation):
  """Equal scores have no spread: all are the best."""
  arrays = make(lengths=(40,))
  arrays[1] = jnp.broadcast_to(arrays[1][:, :, :1], arrays[1].shape)
  y, count = run(arrays, top_k=3, implementation=implementation)
  np.testing.assert_array_equal(count, 40)
  np.testing.assert_allclose(y, formula(arrays, top_k=1000)[0], atol=1e-5)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_bfloat16_is_summed_in_float32(formula, implementation):
  arrays = make(dtype=jnp.bfloat16)
  y, _ = run(arrays, implementation=implementation)
  assert y.dtype == jnp.bfloat16
  expected = formula(arrays)[0]
  error = np.linalg.norm(np.asarray(y, np.float64) - expected)
  assert error < 6e-3 * np.linalg.norm(expected)


def interpreted(arrays, **options):
  """The TPU kernel on a CPU: races, and reads of what was never written,
  show."""
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(
      detect_races=True, uninitialized_memory="nan")):
    return jax.block_until_ready(sparse_attention(
        *arrays, implementation="pallas_tpu", **options))


@pytest.mark.parametrize("lengths, window, top_k, dtype", [
    ((512, 1, 300), EVERYTHING, 1, jnp.float32),
    ((512, 130, 300), 200, 24, jnp.float32),
    ((512,), EVERYTHING, 1000, jnp.bfloat16)])
def test_the_tpu_kernel(formula, capfd, lengths, window, top_k, dtype):
  arrays = make(lengths, 512, 2, 2, predictor=128, rest=128, dtype=dtype)
  expected, kept = formula(arrays, window, top_k)
  # Blocks of 128 without a kept key are not read, and of the others whatever
  # is not kept does not matter.
  read = kept.any(2)[..., None]
  poisoned = [*arrays[:2], *(jnp.where(read, x, jnp.nan) for x in arrays[2:4]),
              arrays[4]]
  y, count = interpreted(poisoned, window=jnp.int32(window), top_k=top_k)
  error = np.linalg.norm(np.asarray(y, np.float64) - expected)
  limit = 1e-5 if dtype == jnp.float32 else 8e-3
  assert error < limit * np.linalg.norm(expected)
  np.testing.assert_array_equal(count, kept.sum(-1))
  assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows_in_the_tpu_kernel(where):
  arrays = make((200,), 256, 1, 2, predictor=128, rest=128)
  arrays[where] = arrays[where].at[0, 0, 0].set(jnp.nan)
  y, _ = interpreted(arrays, window=EVERYTHING, top_k=1000 if where else 12)
  assert np.isnan(y).any()


def test_ties_are_all_kept_in_the_tpu_kernel(formula):
  arrays = make((200,), 256, 1, 2, predictor=128, rest=128)
  arrays[1] = jnp.broadcast_to(arrays[1][:, :, :1], arrays[1].shape)
  y, count = interpreted(arrays, window=EVERYTHING, top_k=3)
  np.testing.assert_array_equal(count, 200)
  np.testing.assert_allclose(y, formula(arrays, top_k=1000)[0], atol=1e-4)


def test_what_the_tpu_kernel_cannot_take():
  arrays = make(slots=300)
  assert unsupported("xla", *arrays[:4]) is None
  assert "300 slots" in unsupported("pallas_tpu", *arrays[:4])
  assert "E - P of 6" in unsupported("pallas_tpu", *make(slots=256)[:4])
  with pytest.raises(ValueError, match="'pallas_tpu': 300 slots are not a"):
    run(arrays, implementation="pallas_tpu")


@pytest.mark.parametrize("change, message", [
    (dict(implementation="cuda"), "implementation='cuda' is not one of xla, "),
    (dict(key2_BxKxSxU=jnp.zeros((3, 2, 40, 7))),
     r"key2_BxKxSxU has shape \(3, 2, 40, 7\), expected \(3, 2, 40, 6\)"),
    (dict(value_BxKxSxE=jnp.zeros((3, 2, 41, 10))), "value_BxKxSxE has shape"),
    (dict(lengths_B=jnp.zeros(2, int)), r"lengths_B has shape \(2,\)"),
    (dict(top_k=0), "top_k=0 must be above 0"),
])
def test_what_does_not_fit_is_refused(change, message):
  arguments = dict(zip(NAMES, make()), window=9, top_k=3) | change
  with pytest.raises(ValueError, match=message):
    sparse_attention(**arguments)
  del arguments["query_BxKxGxE"]
  with pytest.raises(ValueError, match=message):
    write_and_attend(jnp.zeros((3, 8, 10)), jnp.zeros((3, 2, 5)), **arguments)


@pytest.mark.parametrize("rows, rotary, message", [
    ((3, 4, 10), (3, 2, 5), r"rows_BxRxE has shape \(3, 4, 10\), expected"),
    ((3, 7, 10), (3, 2, 5), "rows_BxRxE has shape"),
    ((3, 8, 10), (3, 2, 4), r"rotary_Bx2xT has .* expected \(3, 2, 5\)"),
])
def test_rows_that_do_not_fit_are_refused(rows, rotary, message):
  with pytest.raises(ValueError, match=message):
    write_and_attend(jnp.zeros(rows), jnp.zeros(rotary), *make()[1:], window=9,
                     top_k=3)


@dataclasses.dataclass
class Device:
  platform: str
  compute_capability: str = ""


HOPPER, BLACKWELL = Device("gpu", "9.0"), Device("gpu", "10.0")


def chosen(device, slots, top_k=256, dtype=jnp.bfloat16, width=128):
  shapes = ((2, 2 * width), (slots, width), (slots, width), (slots, 2 * width))
  return choose(device, top_k, *(
      jax.ShapeDtypeStruct((1, 4, *s), dtype) for s in shapes))


def test_it_is_chosen_where_it_was_faster():
  cpu = Device("cpu")
  assert chosen(cpu, 4096) == "xla"
  assert chosen(cpu, 1024, top_k=32) is None
  assert chosen(cpu, 4096, top_k=1024) is None
  assert chosen(Device("tpu"), 4096) is None
  assert chosen(HOPPER, 256) == "pallas_gpu"
  assert chosen(BLACKWELL, 4096) is None
  for change in (dict(slots=100), dict(dtype=jnp.float32), dict(width=64)):
    assert chosen(HOPPER, **dict(slots=4096) | change) is None
