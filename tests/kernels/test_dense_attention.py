"""Dense attention of one token, its GPU kernel interpreted and lowered."""

import contextlib
import functools
from unittest import mock

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels import token_attention
from sparse_lm.kernels.dense_attention import gpu
from sparse_lm.kernels.dense_attention import (choose, unsupported,
                                               write_and_attend)

VERSION = jax.__version_info__
interpreted = pytest.mark.skipif(
    VERSION < (0, 12),
    reason="needs clusters in GPU interpret mode, of jax 0.12")
ON_CPU = ["reference", pytest.param("pallas_gpu", marks=interpreted)]
# More queries than a block adds up at a time.
LENGTHS, SLOTS, HEADS, GROUP = (128, 1, 70), 128, 2, 3
EVERYTHING, E = 2**30, 256


def make(lengths=LENGTHS, slots=SLOTS, heads=HEADS, group=GROUP, width=E):
  """A token's rows, their rotary table, a cache, and its lengths."""
  rng = np.random.default_rng(0)
  b, n = len(lengths), width // 2
  rows, key, value = (jnp.array(rng.normal(size=s), jnp.bfloat16) for s in (
      (b, heads * (group + 2), width), *[(b, heads, slots, width)] * 2))
  angle = (np.array(lengths)[:, None] - 1) * 100.0 ** (-np.arange(n) / n)
  rotary = jnp.array(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)
  return [rows, rotary, key, value, jnp.array(lengths, jnp.int32)]


def run(arrays, window=EVERYTHING, logit_softcap=0.0,
        implementation="pallas_gpu"):
  if implementation == "reference":
    interpret = contextlib.nullcontext()
  else:
    interpret = plgpu.force_gpu_interpret_mode(
        plgpu.InterpretGPUParams(detect_races=True))
  with (interpret,
        # It is quicker with fewer, and has no more than eight in a cluster.
        mock.patch.object(token_attention, "PARTS", 2)):
    return jax.device_get(write_and_attend(
        *arrays, window=window, logit_softcap=logit_softcap,
        implementation=implementation))


def formula(arrays, window, logit_softcap):
  """In float64, by loops; the queries and what is written in bfloat16."""
  rows, rotary, key, value = (np.array(a, np.float64) for a in arrays[:4])
  a, b = np.split(rows, 2, -1)
  cos, sin = (rotary[:, i, None] for i in (0, 1))
  turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  turned = np.array(jnp.asarray(turned, jnp.bfloat16), np.float64)
  _, heads, _, width = key.shape
  group = rows.shape[1] // heads - 2
  y = np.zeros((len(rows), heads, group, width))
  for b, k in np.ndindex(len(rows), heads):
    length = int(arrays[4][b])
    if length <= key.shape[2]:
      key[b, k, length - 1] = turned[b, heads * group + k]
      value[b, k, length - 1] = rows[b, heads * (group + 1) + k]
    seen = slice(max(0, length - window), length)
    for g in range(group):
      scores = key[b, k, seen] @ turned[b, k * group + g] / np.sqrt(width)
      if logit_softcap:
        scores = logit_softcap * np.tanh(scores / logit_softcap)
      weights = np.exp(scores - scores.max())
      y[b, k, g] = weights @ value[b, k, seen] / weights.sum()
  return y, (key, value)


@pytest.fixture(params=[1, 2], ids=["lazy", "eager"])
def cluster(request, monkeypatch):
  """Keys are copied once it is known that they are wanted, or before."""
  monkeypatch.setattr(gpu, "cluster_size", lambda *_: request.param)
  gpu._call.clear_cache()
  yield
  gpu._call.clear_cache()


def check_formula(window, logit_softcap, implementation, **shape):
  arrays = make(**shape)
  # Logits of one row's far beyond what exp takes.
  arrays[0] = arrays[0].at[0, 0].multiply(200.0)
  y, caches = run(arrays, window, logit_softcap, implementation)
  expected, written = formula(arrays, window, logit_softcap)
  error = np.linalg.norm(np.asarray(y, np.float64) - expected)
  assert error < 6e-3 * np.linalg.norm(expected)
  for cache, x in zip(caches, written):
    np.testing.assert_allclose(np.asarray(cache, np.float64), x, rtol=2**-7,
                               atol=1e-5)


CASES = pytest.mark.parametrize("window, logit_softcap", [
    (EVERYTHING, 0.0), (40, 2.0), (EVERYTHING, 50.0)])


@CASES
def test_reference_against_the_formula(window, logit_softcap):
  check_formula(window, logit_softcap, "reference")


@interpreted
@pytest.mark.usefixtures("cluster")
@CASES
def test_kernel_against_the_formula(capfd, window, logit_softcap):
  check_formula(window, logit_softcap, "pallas_gpu")
  assert "RACE" not in "".join(capfd.readouterr())


@interpreted
@pytest.mark.parametrize("group", [1, 5, 8])
def test_narrow_heads_and_other_groups(group):
  check_formula(40, 2.0, "pallas_gpu", lengths=(70,), slots=96, heads=1,
                group=group, width=128)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_only_visible_keys_matter(implementation):
  arrays = make(group=1)
  expected, _ = run(arrays, 45, implementation=implementation)
  slots, lengths = np.arange(SLOTS), np.array(LENGTHS)[:, None]
  seen = ((slots < lengths) & (slots >= lengths - 45))[:, None, :, None]
  arrays[2:4] = (jnp.where(seen, a, jnp.nan) for a in arrays[2:4])
  y, _ = run(arrays, 45, implementation=implementation)
  np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows(implementation, where, bad):
  arrays = make((50,), 64, 1, 1)
  arrays[where] = arrays[where].at[0, 0, ..., 5].set(bad)
  y, _ = run(arrays, implementation=implementation)
  if where in (0, 2) and bad == np.inf:
    # Of one sign or the other, all logits or one: the softmax decides.
    with np.errstate(invalid="ignore"):
      expected, _ = formula(arrays, EVERYTHING, 0.0)
    np.testing.assert_array_equal(np.isfinite(np.asarray(y, np.float32)),
                                  np.isfinite(expected))
  else:
    assert not np.isfinite(np.asarray(y, np.float32)).all()


@pytest.mark.parametrize("implementation", ON_CPU)
def test_a_token_beyond_the_slots_is_not_written(implementation):
  arrays = make((65,), 64, 1, 1)
  y, caches = run(arrays, implementation=implementation)
  for cache, before in zip(caches, arrays[2:4]):
    np.testing.assert_array_equal(cache, before)
  expected, _ = formula(arrays, EVERYTHING, 0.0)
  assert np.abs(np.asarray(y, np.float64) - expected).max() < 0.02


@pytest.mark.parametrize("batch, slots", [
    (1, 256), (1, 1088), (1, 4160), (8, 1088), (8, 32768)])
def test_lowers_at_the_shapes_of_a_2b_model(batch, slots):
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  cache = bf16((batch, 4, slots, E))
  lowered = jax.jit(functools.partial(
      write_and_attend, window=4096, logit_softcap=50.0,
      implementation="pallas_gpu")).trace(
          bf16((batch, 16, E)),
          jax.ShapeDtypeStruct((batch, 2, E // 2), jnp.float32), cache, cache,
          jax.ShapeDtypeStruct((batch,), jnp.int32)).lower(
              lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") == 1


def test_what_it_cannot_serve():
  def reason(batch=1, group=2, slots=64, width=E, dtype=jnp.bfloat16):
    return unsupported("pallas_gpu", *(
        jax.ShapeDtypeStruct((batch, 4, n, width), dtype)
        for n in (group, slots)))

  assert reason() is None
  assert reason(dtype=jnp.float32) == "needs bfloat16, not float32"
  assert reason(slots=100) == "100 slots are not a multiple of 16"
  assert reason(width=64) == "E of 64 is not 128 or 256"
  assert "not 9 and 65" in reason(batch=65, group=9)
  x = jnp.zeros((1, 4, 2, E), jnp.bfloat16)
  assert choose(jax.devices()[0], x, jnp.zeros((1, 4, 64, E), x.dtype)) is None
  arrays = make((50,), 64, 1, 1)
  with pytest.raises(ValueError, match="needs bfloat16"):
    write_and_attend(*(a.astype(jnp.float32) for a in arrays), window=9,
                     implementation="pallas_gpu")
  for i, message in ((0, r"rows_BxRxE has shape \(0, 3, 256\), expected"),
                     (1, "rotary_Bx2xT has"), (2, "key_BxKxSxE has"),
                     (4, r"lengths_B has shape \(0,\), expected \(1,\)")):
    bad = [a[:0] if j == i else a for j, a in enumerate(arrays)]
    with pytest.raises(ValueError, match=message):
      write_and_attend(*bad, window=9)
