"""Schedules of the learning rate and the penalty, at the steps that matter."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from sparse_lm.config import OptimizerConfig, PenaltyConfig
from sparse_lm.errors import UserError
from sparse_lm.training import schedules
from sparse_lm.training.schedules import learning_rate, progressive_penalty

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" /
                     "prosparse_factors.json").read_text())


def at(step, **keys):
  config = OptimizerConfig(learning_rate=2.0, warmup_steps=10,
                           final_fraction=0.1, **keys)
  return float(learning_rate(config, 110)(step))


@pytest.mark.parametrize("schedule", ["cosine", "warmup_stable_decay",
                                      "constant"])
def test_warmup_is_linear_and_learns_from_the_first_step(schedule):
  for step in range(10):
    assert at(step, schedule=schedule, decay_steps=20) == pytest.approx(
        2.0 * (step + 1) / 10)


def test_cosine():
  for step in (10, 35, 60, 110):
    expected = 0.2 + 1.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
    assert at(step, schedule="cosine") == pytest.approx(expected)


def test_warmup_stable_decay():
  keys = dict(schedule="warmup_stable_decay", decay_steps=20)
  assert at(10, **keys) == at(60, **keys) == at(90, **keys) == 2.0
  assert at(100, **keys) == pytest.approx(1.1)
  assert at(110, **keys) == pytest.approx(0.2)


def test_constant():
  assert at(10, schedule="constant") == at(110, schedule="constant") == 2.0


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_published_penalties_against_the_golden_file(name):
  golden, stages = GOLDEN[name], schedules.PROSPARSE_STAGES[name]
  assert list(stages.peaks) == golden["peaks"]
  assert list(stages.boundaries) == golden["boundaries"]
  schedule = progressive_penalty(*stages[:2])
  for step, factor in golden["factors"]:
    # Near a stage's ends 1 + sin is a difference of near numbers in float32.
    np.testing.assert_allclose(schedule(step), factor, rtol=1e-6, atol=2e-8,
                               err_msg=f"step {step}")


def test_every_published_penalty_has_a_golden_list():
  assert set(schedules.PROSPARSE_STAGES) == set(GOLDEN)


PEAKS, BOUNDARIES = (0.1, 0.5, 1.0, 0.25), (3, 7, 17, 27)


def test_the_first_two_peaks_are_level():
  schedule = progressive_penalty(PEAKS, BOUNDARIES)
  for step in (1, 2, 3):
    assert float(schedule(step)) == np.float32(0.1)
  for step in (4, 5, 6, 7):
    assert float(schedule(step)) == np.float32(0.5)


def test_half_a_sine_leads_from_each_later_peak_to_the_next():
  schedule = progressive_penalty(PEAKS, BOUNDARIES)
  for step in range(7, 28):
    low, high, first = (0.5, 1.0, 7) if step <= 17 else (1.0, 0.25, 17)
    expected = low + (high - low) * math.sin(math.pi * (step - first) / 20)**2
    assert float(schedule(step)) == pytest.approx(expected, rel=1e-6), step


def test_the_last_peak_is_held():
  schedule = progressive_penalty(PEAKS, BOUNDARIES)
  for step in (27, 28, 1000, 10**8):
    assert float(schedule(step)) == 0.25


@pytest.mark.parametrize("count", [1, 2])
def test_few_stages_are_level(count):
  schedule = progressive_penalty(PEAKS[:count], BOUNDARIES[:count])
  assert [float(schedule(t)) for t in (1, 3, 4, 7, 100)] == [
      np.float32(PEAKS[min(i, count - 1)]) for i in (0, 0, 1, 1, 1)]


def test_a_traced_step_gives_the_same_factor():
  schedule = progressive_penalty(PEAKS, BOUNDARIES)
  steps = np.arange(1, 31, dtype=np.int32)
  traced = jax.jit(jax.vmap(schedule))(steps)
  np.testing.assert_allclose(traced, [schedule(int(t)) for t in steps],
                             rtol=1e-6)


@pytest.mark.parametrize("peaks, boundaries, message", [
    ((0.1, 0.2), (5, 5), "penalty.boundaries: 5 does not rise above 5"),
    ((0.1, 0.2, 0.3), (5, 9, 8), "penalty.boundaries: 8 does not rise above 9"),
    ((0.1,), (0,), "penalty.boundaries: 0 does not rise above 0"),
    ((0.1, -0.2), (5, 9), "penalty.peaks: -0.2 must not be negative"),
    ((0.1,), (5, 9), "penalty.peaks: 1 peaks and 2 boundaries"),
    ((0.1, 0.2), (5,), "penalty.peaks: 2 peaks and 1 boundaries"),
    ((), (), "penalty.peaks: 0 peaks"),
])
def test_stages_that_are_none(peaks, boundaries, message):
  with pytest.raises(UserError, match=message):
    progressive_penalty(peaks, boundaries)


def test_the_factor_that_a_config_names():
  def factor(**keys):
    return schedules.penalty_factor(PenaltyConfig(**keys))
  assert factor(schedule="none")(3) == 0
  assert factor(schedule="constant", factor=0.5)(3) == 0.5
  assert factor(schedule="controller", factor=0.5) is None
  progressive = factor(schedule="progressive", peaks=PEAKS,
                       boundaries=BOUNDARIES)
  assert float(progressive(4)) == 0.5 and float(progressive(12)) == (
      pytest.approx(0.75))
