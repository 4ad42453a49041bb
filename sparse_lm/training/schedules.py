"""Schedules: functions of the step, as Optax has them."""

import optax

from sparse_lm.config import OptimizerConfig


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
