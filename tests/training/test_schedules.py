"""Learning-rate schedules at the steps that define them."""

import math

import pytest

from sparse_lm.config import OptimizerConfig
from sparse_lm.training.schedules import learning_rate


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
