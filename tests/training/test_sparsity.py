"""Controller and dead neurons: their rules, splits, resumed runs."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.model.transformer import Statistics
from sparse_lm.training import loop, sparsity
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training.sparsity import SparsityState

LAYERS, NEURONS, WIDTH = 2, 64, 32  # of tests/tiny.py

# Dead neurons.


def statistics_of(fired, active=0.5, tokens=1000):
  """Statistics whose layers have these active fractions (one, or N)."""
  sums = {"fired": jnp.asarray(fired, jnp.float32),
          "nonzero_hidden": jnp.full(LAYERS, active) * NEURONS * tokens}
  return Statistics(jnp.float32(tokens), sums)


def test_idle_counts_tokens_saturates_and_starts_again(relu_config):
  config = relu_config(dead_neurons={"after_tokens": 700})
  rng = np.random.default_rng(0)
  state, idle = sparsity.init(config), np.zeros((LAYERS, NEURONS), int)
  seen = set()
  for step in range(1, 31):
    tokens = int(rng.integers(50, 150))
    fired = rng.integers(0, 3, idle.shape) * (rng.random(idle.shape) < 0.1)
    state = sparsity.update(state, jnp.int32(step),
                            statistics_of(fired, tokens=tokens), config)
    idle = np.where(fired > 0, 0, np.minimum(idle + tokens, 700))
    np.testing.assert_array_equal(state.idle_NxF, idle)
    np.testing.assert_array_equal(sparsity.dead_neurons(state, config),
                                  idle == 700)
    seen |= {*idle.flat}
  assert {0, 700} < seen and state.idle_NxF.dtype == jnp.int32


def test_untracked_neurons_are_not_counted(relu_config):
  config = relu_config()
  assert "fired" not in sparsity.measures(config)
  state = sparsity.update(sparsity.init(config), jnp.int32(1),
                          statistics_of(np.zeros((LAYERS, NEURONS))), config)
  assert not state.idle_NxF.any()


# At this threshold most neurons fire in a few rows alone, or in none.
REPAIR = {"model.ffn.activation": "fatrelu", "model.ffn.threshold": 2.5}


@pytest.fixture(scope="module")
def make_repaired(relu_config, make_batch):
  """Dead after one and a half batches without firing."""
  tokens = int((make_batch(relu_config())["segment_ids_BxL"] > 0).sum())
  return functools.partial(relu_config, **REPAIR, dead_neurons={
      "after_tokens": tokens * 3 // 2, "reinitialize": 0.5})


@pytest.fixture(scope="module")
def repaired(make_repaired, take_step):
  return take_step(make_repaired(), steps=2)


def test_a_neuron_is_idle_unless_any_row_fires_it(make_repaired, make_batch,
                                                  initial_params, in_float64,
                                                  repaired):
  """Before the second step no parameter that matters here has moved much."""
  config = make_repaired()
  params, batch = initial_params(config), make_batch(config)
  _, g, _, counts = in_float64(config, params, batch)
  fires = (g >= 2.5) & counts[..., None]
  rows = fires.any(2).sum(1)  # that each neuron fires in (N, F)
  assert (rows == 0).sum() > 10 and (rows == 1).sum() > 10
  tokens, dead = counts.sum(), config.training.dead_neurons.after_tokens
  state = sparsity.update(
      sparsity.init(config), jnp.int32(1), statistics_of(
          fires.sum((1, 2)), tokens=tokens), config)
  np.testing.assert_array_equal(state.idle_NxF, tokens * (rows == 0))
  # The step's own counts, a step later: 0, one batch, or dead.
  idle = np.asarray(repaired[0].sparsity.idle_NxF)
  assert {*idle.flat} == {0, int(tokens), dead}
  # Repair had not begun, so all but a few are as they were.
  assert ((idle == dead) == (rows == 0)).mean() > 0.9
  np.testing.assert_allclose(repaired[1]["dead_fraction_N"],
                             (idle == dead).mean(-1), rtol=1e-6)


def test_dead_neurons_do_not_depend_on_the_split(make_repaired, take_step,
                                                 repaired, assert_same_step):
  config = make_repaired(**{"training.micro_batches": 8})
  assert_same_step(take_step(config, steps=2), repaired, 1e-4)
  config = make_repaired(mesh={"data": 4, "tensor": 2})
  ours = take_step(config, mesh=mesh_lib.make_mesh(config), steps=2)
  assert_same_step(ours, repaired, 1e-4)


def reinitialized(config, dead_NxF, params, step=3):
  after = config.training.dead_neurons.after_tokens
  state = SparsityState(jnp.float32(0), jnp.where(dead_NxF, after, after - 1))
  return jax.device_get(sparsity.reinitialize(params, state, jnp.int32(step),
                                              config))


@pytest.mark.parametrize("shape, inputs", [("gated", WIDTH), ("spark", 16)])
def test_reinitialization_mixes_draws_into_dead_gates_alone(
    relu_config, initial_params, shape, inputs):
  share, dead = 0.1, np.arange(NEURONS) % 4 != np.arange(LAYERS)[:, None]
  config = relu_config(**{"model.ffn.shape": shape}, dead_neurons={
      "after_tokens": 9, "reinitialize": share})
  params = jax.device_get(initial_params(config))
  new = reinitialized(config, dead, params)
  before, after = (p["blocks"]["ffn"].pop("gate_DxF").swapaxes(1, 2)
                   for p in (jax.tree.map(np.copy, params), new))
  np.testing.assert_array_equal(before[~dead], after[~dead])
  others = jax.tree.map(np.copy, params)
  del others["blocks"]["ffn"]["gate_DxF"]
  jax.tree.map(np.testing.assert_array_equal, others, new)
  fresh = (after[dead].astype(np.float64) - (1 - share) * before[dead]) / share
  # Of N(0, 1 / inputs), by the standard errors of its mean and variance.
  count = fresh.size
  assert fresh.shape == (dead.sum(), inputs)
  assert abs(fresh.mean()) < 4 * (inputs * count)**-0.5
  assert abs(fresh.var() * inputs - 1) < 4 * (2 / count)**0.5
  # Every neuron has a draw of its own, and no draw is the old weights again.
  assert len({*fresh[:, 0]}) == len(fresh)
  assert abs(np.corrcoef(fresh.ravel(), before[dead].ravel())[0, 1]) < (
      4 * count**-0.5)


def test_reinitialization_draws_by_seed_and_step(relu_config,
                                                  initial_params):
  def gate(step, seed=0):
    config = relu_config(dead_neurons={"after_tokens": 9, "reinitialize": 1.0},
                         **{"training.seed": seed})
    return reinitialized(config, np.ones((LAYERS, NEURONS), bool), params,
                         step)["blocks"]["ffn"]["gate_DxF"]
  params = initial_params(relu_config())
  np.testing.assert_array_equal(gate(3), gate(3))
  assert (gate(3) != gate(4)).mean() > 0.99
  assert (gate(3) != gate(3, seed=1)).mean() > 0.99


def test_reinitialization_leaves_living_neurons_as_they_are(relu_config,
                                                            initial_params):
  config = relu_config(dead_neurons={"after_tokens": 9, "reinitialize": 0.1})
  params = jax.device_get(initial_params(config))
  jax.tree.map(np.testing.assert_array_equal, params, reinitialized(
      config, np.zeros((LAYERS, NEURONS), bool), params))


# The controller.


@pytest.fixture(scope="module")
def make_controller(relu_config):
  config = relu_config(penalty={"schedule": "controller", "factor": 1e-8,
                                "rate": 1.2, "target_active_fraction": 0.05})
  run = jax.jit(functools.partial(sparsity.update, config=config))
  return config, run


@pytest.mark.parametrize("active, change", [
    (0.06, 1.2), (0.04, 1 / 1.2), ((0.09, 0.02), 1.2), ((0.07, 0.01), 1 / 1.2)])
def test_the_controller_multiplies_or_divides_by_its_rate(make_controller,
                                                          active, change):
  """By the mean over layers; by nothing else than the rate."""
  config, update = make_controller
  state = dataclasses.replace(sparsity.init(config), factor=jnp.float32(3e-4))
  state = update(state, jnp.int32(8), statistics_of(
      0, np.asarray(active), tokens=123))
  np.testing.assert_allclose(state.factor, 3e-4 * change, rtol=3e-7)


def test_the_controller_reaches_its_target_and_holds_it(make_controller):
  """A model that answers each factor slowly, from 1e-8 to where it must be.

  Active neurons fall with the factor's square root, each step a fifth of the
  way. The factor that gives the target is 1e-3, 63 rates above the first.
  """
  config, update = make_controller
  state, active, history = sparsity.init(config), 0.5, []
  assert state.factor == np.float32(1e-8)
  for step in range(1, 301):
    wanted = min(0.5, 0.05 * (float(state.factor) / 1e-3)**-0.5)
    active += (wanted - active) / 5
    history.append(active)
    state = update(state, jnp.int32(step), statistics_of(
        0, active * np.array([0.5, 1.5])))
  # It has to climb first: nothing changes below a factor of 1e-5, 38 rates up.
  assert min(history[:35]) > 0.4
  settled = np.array(history[120:])
  assert settled.min() > 0.035 and settled.max() < 0.07
  assert 0.045 < settled.mean() < 0.055
  assert 5e-4 < float(state.factor) < 2e-3


# Whole runs.


def train(config, workdir):
  lines = []
  outcome = loop.train(config, workdir, lines.append)
  return outcome.state, lines


def metrics_of(workdir, split="train"):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  lines = [line for line in map(json.loads, lines) if line["split"] == split]
  for line in lines:
    line.pop("tokens_per_second", None)
  return lines


def as_if_killed(workdir, copy, step):
  """A copy of the run's folder in which only checkpoint `step` is left."""
  shutil.copytree(workdir, copy)
  for checkpoint in (copy / "checkpoints").iterdir():
    if checkpoint.name != str(step):
      shutil.rmtree(checkpoint)
  return copy


RUN = {"model.num_layers": 1, "training.num_steps": 12, "training.log_every": 1,
       "training.eval_every": 12, "training.checkpoint_every": 8,
       "training.keep_checkpoints": 3}
PROGRESSIVE = dict(
    penalty={"schedule": "progressive", "peaks": (0.01, 0.1, 0.6),
             "boundaries": (2, 4, 11)},
    dead_neurons={"after_tokens": 150, "reinitialize": 0.1})
CONTROLLER = dict(
    penalty={"schedule": "controller", "factor": 0.1, "rate": 1.5,
             "target_active_fraction": 0.2},
    dead_neurons={"after_tokens": 10**6})


@pytest.fixture(scope="module", params=["progressive", "controller"])
def runs(request, relu_config, tmp_path_factory):
  """Name, config; folder and end of a run, and of one resumed at step 8."""
  config = relu_config(**RUN, **(
      PROGRESSIVE if request.param == "progressive" else CONTROLLER))
  whole = tmp_path_factory.mktemp("runs") / "whole"
  state, _ = train(config, whole)
  resumed = as_if_killed(whole, whole.with_name("resumed"), 8)
  again, lines = train(config, resumed)
  assert "resuming from step 8" in lines
  return request.param, config, (whole, state), (resumed, again)


def test_every_logged_step_has_its_factor_and_learning_rate(runs):
  name, config, (workdir, _), _ = runs
  lines = metrics_of(workdir)
  assert [line["step"] for line in lines] == list(range(1, 13))
  ramp = [0.005, 0.01]
  cosine = [0.001 + 0.009 * (1 + np.cos(np.pi * t / 10)) / 2 for t in range(10)]
  np.testing.assert_allclose([line["learning_rate"] for line in lines],
                             ramp + cosine, rtol=1e-5)
  factors = [line["penalty_factor"] for line in lines]
  if name == "progressive":
    sine = [0.1 + 0.5 * np.sin(np.pi * t / 14)**2 for t in range(1, 8)]
    expected = [0.01, 0.01, 0.1, 0.1, *sine, 0.6]
  else:
    expected = [0.1]
    target = config.training.penalty.target_active_fraction
    for line in lines[:-1]:
      rate = 1.5 if line["hidden_fraction"] > target else 1 / 1.5
      expected.append(expected[-1] * rate)
    # Both ways.
    assert len({*np.sign(np.diff(factors))}) == 2
  np.testing.assert_allclose(factors, expected, rtol=1e-5)


def test_resumed_is_as_uninterrupted(runs):
  """Parameters, optimizer, factor, idle counts, every line; bit by bit."""
  name, _, (whole, state), (resumed, again) = runs
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert metrics_of(resumed) == metrics_of(whole)
  assert metrics_of(resumed, "eval") == metrics_of(whole, "eval")
  lines, idle = metrics_of(whole), np.asarray(state.sparsity.idle_NxF)
  if name == "progressive":  # There was something to repair, after step 8.
    assert min(line["dead_fraction"] for line in lines[8:]) > 0
  else:  # There are counts that began before it: four steps have 1,024 tokens.
    assert idle.max() > 4 * 8 * 32


@pytest.mark.parametrize("active, bound", [(0.0, 1e-12), (1.0, 1e6)])
def test_the_controller_stays_where_it_can_return_from(relu_config, active,
                                                       bound):
  """Out of reach for a thousand steps, the factor is neither 0 nor infinite."""
  config = relu_config(penalty={"schedule": "controller", "factor": 0.5})
  update = jax.jit(lambda state: jax.lax.fori_loop(
      0, 1000, lambda i, state: sparsity.update(
          state, i, statistics_of(0, active), config), state))
  assert float(update(sparsity.init(config)).factor) == pytest.approx(bound)


def test_without_a_penalty_nothing_more_is_measured(relu_config):
  config = relu_config()
  assert sparsity.init(config).factor == 0
  assert sparsity.measures(config) == ("active_neurons", "nonzero_hidden")


@pytest.mark.parametrize("keys, first, second", [
    (dict(schedule="none"), 0.0, 0.0),
    (dict(schedule="constant", factor=0.5), 0.5, 0.5),
    (dict(schedule="progressive", peaks=(0.25, 0.5), boundaries=(1, 4)), 0.25,
     0.5),
    (dict(schedule="controller", factor=0.5), 0.5, 0.6)])
def test_the_first_two_steps_factors(relu_config, keys, first, second):
  config = relu_config(penalty=keys)
  state = sparsity.init(config)
  assert float(state.factor) == first and state.factor.dtype == jnp.float32
  state = sparsity.update(state, jnp.int32(1), statistics_of(0), config)
  assert float(state.factor) == pytest.approx(second)
  assert state.factor.dtype == jnp.float32
