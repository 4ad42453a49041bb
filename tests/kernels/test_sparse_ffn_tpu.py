"""The TPU kernel, interpreted: against float64, its copies checked for races.

And compiled by libtpu, with no TPU at hand.
"""

import functools
import json
from unittest import mock

import hypothesis
from hypothesis import strategies as st
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.sparse_ffn import (Elementwise, StatisticalTopk,
                                          layout, sparse_ffn)
from sparse_lm.kernels.sparse_ffn import reference, tpu

R, U, F, D = 8, 256, 300, 512
ROWS = 2.0  # a STREAM_BELOW with which rows are always fetched one by one
WHOLE = 0.0  # ... and never
# What no copy has filled is NaN, and copies arrive as late as they may.
INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan",
    dma_execution_mode="on_wait")


def make(batch, seed=0, dtype=jnp.float32, plain=False, neurons=F):
  """Scores are integers, exact in every precision, many of them equal."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.array(rng.normal(size=shape), dtype)

  def integer(*shape):
    return jnp.array(rng.integers(-4, 5, shape), dtype)

  x = jnp.concatenate([integer(batch, R), normal(batch, D - R)], axis=1)
  return (x, integer(neurons, R), None if plain else normal(neurons, U),
          normal(neurons, D))


def scores_of(arrays):
  x, gate = (np.asarray(a, np.float64) for a in arrays[:2])
  return x[:, :R] @ gate.T


def formula(arrays, threshold, up_activation=lambda x: x):
  x, gate, up, down = (
      None if a is None else np.asarray(a, np.float64) for a in arrays)
  scores = x[:, :R] @ gate.T
  hidden = np.where(scores > threshold, scores, 0)
  active = (hidden != 0).sum(-1)
  if up is not None:
    hidden = hidden * up_activation(x[:, -U:] @ up.T)
  return hidden @ down, active


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _run(arrays, select, up_activation, stream_below, *operands):
  with mock.patch.object(tpu, "STREAM_BELOW", stream_below):
    return sparse_ffn(*arrays, select=lambda s: select(s, *operands),
                      up_activation=up_activation,
                      implementation="pallas_tpu")


def select_above(scores, threshold):
  return jnp.where(scores > threshold, scores, 0)


def identity(x):
  return x


def run_select(arrays, select, *operands, up_activation=identity,
               stream_below=ROWS):
  arrays = (*arrays[:2], *(a if a is None else layout(a, "pallas_tpu")
                           for a in arrays[2:]))
  with pltpu.force_tpu_interpret_mode(INTERPRET):
    outputs = jax.block_until_ready(
        _run(arrays, select, up_activation, stream_below, *operands))
  assert not interpret_pallas_call.races.races_found
  return outputs


def run(arrays, threshold, **options):
  return run_select(arrays, select_above, jnp.float32(threshold), **options)


def assert_close(y, expected, dtype):
  error = np.linalg.norm(np.asarray(y, np.float64) - expected)
  tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 6e-3}[dtype]
  assert error <= tolerance * np.linalg.norm(expected)


@hypothesis.given(
    batch=st.sampled_from([1, 5, 64]), seed=st.integers(0, 99),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    # Of all scores: from none to all active.
    fraction=st.sampled_from([0, 0.002, 0.02, 0.1, 0.5, 1]),
    plain=st.booleans(),
    neurons=st.sampled_from([130, 256, F]),
    stream_below=st.sampled_from([tpu.STREAM_BELOW, ROWS]))
@hypothesis.settings(deadline=None, max_examples=2)
@hypothesis.example(1, 0, jnp.float32, 0, False, F, ROWS)
@hypothesis.example(64, 0, jnp.bfloat16, 1, False, F, ROWS)
# More groups than there are slots.
@hypothesis.example(1, 0, jnp.bfloat16, 0.8, False, 800, ROWS)
@hypothesis.example(1, 0, jnp.bfloat16, 0.1, False, F, tpu.STREAM_BELOW)
@hypothesis.example(5, 0, jnp.float32, 0.02, True, 256, tpu.STREAM_BELOW)
def test_against_the_formula(batch, seed, dtype, fraction, plain, neurons,
                             stream_below):
  arrays = make(batch, seed, dtype, plain, neurons)
  scores = scores_of(arrays)
  threshold = np.quantile(scores, 1 - fraction) + (0.5 if fraction < 1 else -1)
  y, active = run(arrays, threshold, stream_below=stream_below)
  expected, count = formula(arrays, threshold)
  assert y.dtype == dtype
  assert_close(y, expected, dtype)
  np.testing.assert_array_equal(active, count)


@pytest.mark.parametrize("select", [
    Elementwise(jax.nn.relu), StatisticalTopk(1.0, jax.nn.relu),
    StatisticalTopk(1.0, lambda x: jax.nn.gelu(x, approximate=True), True)],
                         ids=["elementwise", "statistical", "gelu"])
def test_selections_and_the_other_branch_have_activations(select):
  arrays = make(3)
  y, active = run_select(arrays, select, up_activation=jax.nn.relu)
  expected, count = reference.sparse_ffn(*arrays, select, jax.nn.relu)
  assert_close(y, np.asarray(expected, np.float64), jnp.float32)
  np.testing.assert_array_equal(active, count)
  assert 0 < active.min() and active.max() < F


@pytest.mark.parametrize("stream_below", [ROWS, WHOLE])
def test_ties_at_the_threshold_are_inactive(stream_below):
  arrays = make(2)
  scores = scores_of(arrays)
  threshold = np.quantile(scores, 0.9).round()
  assert (scores == threshold).sum() > 5
  y, active = run(arrays, threshold, stream_below=stream_below)
  expected, count = formula(arrays, threshold)
  np.testing.assert_array_equal(active, count)
  assert_close(y, expected, jnp.float32)


def test_both_ways_and_another_run_give_the_same():
  arrays = make(3, seed=3)
  by_rows = run(arrays, 20)
  again = run(arrays, 20)
  whole = run(arrays, 20, stream_below=WHOLE)
  np.testing.assert_array_equal(by_rows[0], again[0])
  assert_close(by_rows[0], np.asarray(whole[0], np.float64), jnp.float32)
  np.testing.assert_array_equal(by_rows[1], whole[1])


def test_rows_of_inactive_neurons_are_not_read():
  """Whatever stands there: NaN would spread from a row that is multiplied."""
  arrays = make(3, seed=2)
  threshold = np.quantile(scores_of(arrays), 0.95) + 0.5
  expected, active_B = run(arrays, threshold, stream_below=tpu.STREAM_BELOW)
  assert active_B.min() > 0 and active_B.sum() < tpu.STREAM_BELOW * F
  idle_F = (scores_of(arrays) <= threshold).all(0)
  poisoned = (*arrays[:2], *(jnp.where(idle_F[:, None], jnp.nan, a)
                             for a in arrays[2:]))
  y, _ = run(poisoned, threshold, stream_below=tpu.STREAM_BELOW)
  np.testing.assert_array_equal(y, expected)
  y, _ = run(poisoned, threshold, stream_below=WHOLE)
  assert np.isnan(y).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_shows(where, value):
  arrays = list(make(1))
  arrays[where] = arrays[where].at[0, -1].set(value)
  # All are active: whatever holds it is used.
  y, _ = run_select(arrays, identity)
  assert not np.isfinite(y).all()


def test_a_matrix_that_is_not_laid_out_is():
  arrays = make(2, dtype=jnp.bfloat16)
  expected, _ = run(arrays, 20)
  with pltpu.force_tpu_interpret_mode(INTERPRET):
    y, _ = _run(arrays, select_above, identity, ROWS, jnp.float32(20))
  np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype, change, message", [
    (jnp.bfloat16, dict(up=384),
     r"up_FxU has rows of 384 numbers, not a multiple of 256 \(bfloat16\)"),
    (jnp.float32, dict(down=300),
     r"down_FxD has rows of 300 numbers, not a multiple of 128 \(float32\)"),
    (jnp.float16, {}, "up_FxU is float16, not bfloat16 or float32"),
    (jnp.float32, dict(neurons=127), "down_FxD has 127 rows, fewer than 128"),
    (jnp.float32, dict(neurons=10**6), "bytes of fast memory, more than"),
])
def test_what_the_kernel_cannot_take_is_refused(dtype, change, message):
  sizes = dict(up=256, down=512, neurons=128) | change
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (
      (40, sizes["down"]), (sizes["neurons"], R),
      (sizes["neurons"], sizes["up"]), (sizes["neurons"], sizes["down"]))]
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(
        sparse_ffn, select=jax.nn.relu, implementation="pallas_tpu"),
                   *arrays)


def test_matrices_of_two_types_are_refused():
  x, gate, up, down = make(64)
  rest = jax.nn.relu, identity
  assert tpu.unsupported(x, gate, up, down, *rest) is None
  assert tpu.unsupported(x, gate, None, tpu.layout(down), *rest) is None
  assert "float32" in tpu.unsupported(x, gate, up, down.astype(jnp.bfloat16),
                                      *rest)


SCRIPT = r"""
import json, re, sys
import jax, jax.numpy as jnp
from sparse_lm.kernels.sparse_ffn import StatisticalTopk, sparse_ffn, tpu
from sparse_lm.training import aot

R, U, F, D = 1024, 1280, 13824, 2304
SELECT = StatisticalTopk(1.4, lambda x: jax.nn.gelu(x, approximate=True))
sharding = jax.sharding.SingleDeviceSharding(aot.tpu_devices(sys.argv[1])[0])

def spec(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

def report(batch, up, down):
  compiled = jax.jit(lambda *arrays: sparse_ffn(
      *arrays, select=SELECT, implementation="pallas_tpu")).lower(
          spec(batch, D), spec(F, R), up, down).compile()
  moved = re.findall(
      r"\[13824,(?:2,640|1280|2,1152|2304)\][^\n]* "
      r"(copy|copy-start|fusion|transpose|reshape|convert)\(",
      compiled.as_text())
  return dict(batch=batch, moved=moved, temporaries=aot.bytes_per_chip(
      compiled)["temporaries"])

laid_out = [jax.eval_shape(tpu.layout, spec(F, w)).shape for w in (U, D)]
print(json.dumps(
    [report(batch, *(spec(*shape) for shape in laid_out))
     for batch in (1, 8, 64)] + [report(1, spec(F, U), spec(F, D))]))
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiled_for_a_tpu_no_matrix_is_copied(topology, run_with_libtpu):
  *reports, not_laid_out = json.loads(run_with_libtpu(SCRIPT, topology))
  assert len(reports) == 3
  for report in reports:
    assert not report["moved"]
    assert report["temporaries"] < 1e6  # of 99e6 in `up` and `down`
  # What the layout is for, and that the test would see it.
  assert not_laid_out["moved"]
