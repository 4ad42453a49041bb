"""Schedules: functions of the step, as Optax has them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from sparse_lm.config import OptimizerConfig, PenaltyConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Linear warm-up, then cosine, warm-up-stable-decay or constant.

  Args:
    config: peak, warm-up and decay steps, the final fraction of the peak.
    num_steps: steps in the run; the schedule ends there.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  end = peak * config.final_fraction
  after = max(num_steps - warmup, 1)
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(peak, after, config.final_fraction)
  elif config.schedule == "warmup_stable_decay":
    stable = num_steps - warmup - config.decay_steps
    main = optax.join_schedules(
        [optax.constant_schedule(peak),
         optax.linear_schedule(peak, end, max(config.decay_steps, 1))],
        [stable])
  else:
    main = optax.constant_schedule(peak)
  if not warmup:
    return main
  # The first step learns too: the ramp starts one step above 0.
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, main], [warmup])


def progressive_penalty(peaks: Sequence[float],
                        boundaries: Sequence[int]) -> optax.Schedule:
  """ProSparse's penalty factor (arXiv 2402.13516, Algorithm 1, Appendix B).

  peaks[0] up to and including step boundaries[0]; peaks[1] held up to
  boundaries[1]; from then on, for i >= 2, half a sine from peaks[i - 1] at
  boundaries[i - 1] to peaks[i] at boundaries[i]:

      eta    = (sin(-pi/2 + pi (t - T[i-1]) / (T[i] - T[i-1])) + 1) / 2
      factor = peaks[i-1] + eta (peaks[i] - peaks[i-1])

  and the last peak ever after. Steps count from 1: a step's factor is the
  schedule at its own number.

  Args:
    peaks: one a stage, none negative. Stage 0 of the paper, ReLU without a
      penalty, is a first peak of 0.
    boundaries: each stage's last step, rising.

  Raises:
    UserError: where they are not that.
  """
  PenaltyConfig(schedule="progressive", peaks=tuple(map(float, peaks)),
                boundaries=tuple(map(int, boundaries)))
  ends = np.asarray(boundaries, np.float32)
  to = np.asarray(peaks, np.float32)
  start = np.concatenate([[0], ends[:-1]])
  # The first two stages are level.
  origin = np.concatenate([to[:2], to[1:-1]])[:len(to)]

  def schedule(count):
    step = jnp.asarray(count, jnp.float32)
    stage = jnp.clip(jnp.searchsorted(ends, step), 0, len(ends) - 1)
    first, last = jnp.asarray(start)[stage], jnp.asarray(ends)[stage]
    progress = jnp.clip((step - first) / (last - first), 0, 1)
    eta = (jnp.sin(jnp.pi * (progress - 0.5)) + 1) / 2
    low = jnp.asarray(origin)[stage]
    return low + eta * (jnp.asarray(to)[stage] - low)

  return schedule


def penalty_factor(config: PenaltyConfig) -> optax.Schedule | None:
  """The L1 factor at each step, counted from 1; None for the controller."""
  if config.schedule == "progressive":
    return progressive_penalty(config.peaks, config.boundaries)
  if config.schedule == "controller":
    return None
  return optax.constant_schedule(
      config.factor if config.schedule == "constant" else 0.0)


class Stages(NamedTuple):
  """A published ProSparse schedule, for `progressive_penalty`."""

  peaks: tuple[float, ...]
  boundaries: tuple[int, ...]  # steps
  batch_tokens: float  # tokens a step

  def scaled(self, num_steps: int, last_peak: float) -> "Stages":
    """The same shape in `num_steps` steps, up to `last_peak`."""
    time, height = num_steps / self.boundaries[-1], last_peak / self.peaks[-1]
    return Stages(tuple(height * p for p in self.peaks),
                  tuple(round(time * b) for b in self.boundaries),
                  self.batch_tokens)


# arXiv 2402.13516, Appendix, the table of hyper-parameters; tokens a step are
# its tokens divided by its steps. MiniCPM's supervised fine-tuning follows
# with a constant factor of 1e-2, up to step 101,000.
PROSPARSE_STAGES = {
    "llama2_7b": Stages((0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1),
                        (5_000, 6_000, 10_000, 12_000, 16_000, 16_500),
                        2.097e6),
    "llama2_13b": Stages((0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2),
                         (5_500, 6_750, 10_750, 11_000, 15_000, 16_000),
                         8.389e6),
    "minicpm_1b": Stages((0, 1e-3, 5e-3, 5e-3, 5e-2, 5e-2),
                         (10_000, 15_000, 20_000, 25_000, 35_000, 95_000),
                         4.915e6),
}
MINICPM_1B_SFT_FACTOR, MINICPM_1B_SFT_END = 1e-2, 101_000
