"""What training adds for the sake of sparsity: penalties, controller, repair.

Everything is a function of `Statistics`, sums over the tokens of the whole
batch: so nothing depends on how the batch is split over micro-batches or
devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.config import Config, PenaltyConfig
from sparse_lm.model.activity import COUNTS
from sparse_lm.model.transformer import Statistics
from sparse_lm.training import schedules


# Where the controller stays: 0 and infinity it could not leave again.
_FACTOR_RANGE = 1e-12, 1e6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparsityState:
  """What the penalty and the repair remember from step to step.

  A name that ends in its axes says how the array is split, as a parameter's.
  """

  factor: jax.Array  # of the L1 penalty, for the next step; float32
  # Tokens since each neuron last fired (int32), up to
  # `dead_neurons.after_tokens`.
  idle_NxF: jax.Array


def init(config: Config) -> SparsityState:
  """The state before the first step."""
  model = config.model
  first = jnp.asarray(config.training.penalty.factor, jnp.float32)
  return SparsityState(
      _scheduled(config, jnp.zeros((), jnp.int32), first),
      jnp.zeros((model.num_layers, model.ffn.num_neurons), jnp.int32))


def _scheduled(config: Config, step: jax.Array,
               previous: jax.Array) -> jax.Array:
  """The factor for the step after `step`; the controller's is `previous`."""
  schedule = schedules.penalty_factor(config.training.penalty)
  if schedule is None:
    return previous
  return jnp.asarray(schedule(step + 1), jnp.float32)


def measures(config: Config) -> tuple[str, ...]:
  """What a training step has to measure, see model/activity.py."""
  penalty, names = config.training.penalty, [*COUNTS]
  if penalty.schedule != "none":
    names.append("l1")
  if penalty.adjacent:
    names.append("adjacent")
  if penalty.chunk:
    names.append(f"chunk_{penalty.chunk_length}")
  if config.training.dead_neurons.after_tokens:
    names.append("fired")
  return tuple(names)


def _over_layers(sums_N: jax.Array, config: PenaltyConfig) -> jax.Array:
  return sums_N.sum() if config.over_layers == "sum" else sums_N.mean()


def penalty_sum(statistics: Statistics, factor: jax.Array,
                config: Config) -> jax.Array:
  """The penalties, a sum over tokens as the cross-entropy is.

  L1 (arXiv 2402.13516, Section 3.2; arXiv 2603.23198): factor * |h|, over
  neurons and layers as `config.training.penalty` says. The two losses of
  BlockFFN (arXiv 2507.08771, Section 3.3) are means over layers; the one of
  adjacent tokens is added over pairs, of which there are nearly as many.
  """
  penalty, sums = config.training.penalty, statistics.sums
  total = jnp.zeros((), jnp.float32)
  if "l1" in sums:
    neurons = (config.model.ffn.num_neurons
               if penalty.over_neurons == "mean" else 1)
    total += factor * _over_layers(sums["l1"], penalty) / neurons
  if penalty.adjacent:
    total += penalty.adjacent * sums["adjacent"].mean()
  if penalty.chunk:
    total += penalty.chunk * sums[f"chunk_{penalty.chunk_length}"].mean()
  return total


def update(state: SparsityState, step: jax.Array, statistics: Statistics,
           config: Config) -> SparsityState:
  """The state after a step.

  The controller is ReMoE's (arXiv 2412.14711, Section 3.3): the factor is
  multiplied by `rate` where more neurons are active than wanted, else divided,
  within 1e-12 and 1e6.

  Args:
    state: that of the step.
    step: steps taken, this one included.
    statistics: of the step's whole batch.
    config: the run's.
  """
  penalty, dead = config.training.penalty, config.training.dead_neurons
  factor, idle_NxF = state.factor, state.idle_NxF
  if penalty.schedule == "controller":
    neurons = statistics.tokens * config.model.ffn.num_neurons
    active = (statistics.sums["nonzero_hidden"] / neurons).mean()
    factor *= jnp.where(active > penalty.target_active_fraction, penalty.rate,
                        1 / penalty.rate)
    factor = jnp.clip(factor, *_FACTOR_RANGE)
  if dead.after_tokens:
    waited = jnp.minimum(idle_NxF + statistics.tokens.astype(jnp.int32),
                         dead.after_tokens)
    idle_NxF = jnp.where(statistics.sums["fired"] > 0, 0, waited)
  return SparsityState(_scheduled(config, step, factor), idle_NxF)


def dead_neurons(state: SparsityState, config: Config) -> jax.Array:
  """True for the neurons that count as dead (N, F)."""
  return state.idle_NxF >= config.training.dead_neurons.after_tokens


def reinitialize(params: Any, state: SparsityState, step: jax.Array,
                 config: Config) -> Any:
  """Mixes fresh draws into the gate weights of dead neurons, into no others.

  Targeted re-initialisation ("Sparser, Faster, Lighter", arXiv 2603.23198,
  Section 3): W[:, j] <- (1 - a) W[:, j] + a N(0, s^2) for every dead j, each
  step. s is the standard deviation of this model's own initialisation,
  (gate's input width)^-0.5: 0.022 at the paper's width, whose s is 0.02.

  Args:
    params: the model's; only `blocks.ffn.gate_DxF` changes.
    state: says which neurons are dead.
    step: gives the draw its key, with the seed.
    config: the run's.
  """
  share = config.training.dead_neurons.reinitialize
  dead_Nx1xF = dead_neurons(state, config)[:, None]
  key = jax.random.fold_in(jax.random.key(config.training.seed), step)

  def mix(gate):
    fresh = jax.random.normal(key, gate.shape, gate.dtype)
    fresh *= gate.shape[1] ** -0.5
    return jnp.where(dead_Nx1xF, (1 - share) * gate + share * fresh, gate)

  ffn = params["blocks"]["ffn"]
  gate = jax.lax.cond(dead_Nx1xF.any(), mix, lambda gate: gate,
                      ffn["gate_DxF"])
  return dict(params, blocks=dict(params["blocks"],
                                  ffn=dict(ffn, gate_DxF=gate)))
