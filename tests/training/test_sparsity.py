"""Penalties, controller, dead neurons: formulas in float64, splits, resumes."""

import dataclasses
import functools
import json
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.model.attention import layer_windows
from sparse_lm.model.transformer import Layer, Statistics, model_graph
from sparse_lm.training import loop, sparsity
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training.sparsity import SparsityState

EPSILON = 1e-5  # of BlockFFN's chunk loss
LAYERS, NEURONS, WIDTH = 2, 64, 32  # of tests/tiny.py
FACTOR, ADJACENT, CHUNK, CHUNK_LENGTH = 0.02, 0.02, 20.0, 12
PENALTIES = {"schedule": "constant", "factor": FACTOR, "adjacent": ADJACENT,
             "chunk": CHUNK, "chunk_length": CHUNK_LENGTH}


def training(group="", **keys):
  return {f"training.{group}{key}": value for key, value in keys.items()}


@pytest.fixture(scope="module")
def make_config(tiny_config):
  """Tiny with a gated ReLU FFN, its vocabulary such that devices split it."""
  keys = {"model.vocab_size": 264, "model.ffn.shape": "gated",
          "model.ffn.activation": "relu", "model.ffn.sparsifier": "none",
          "model.attention.shape": "dense"}
  return lambda **changes: tiny_config(**{**keys, **changes})


@functools.partial(jax.jit, static_argnums=0)
def ffn_inputs(config, params, batch):
  """What enters each layer's FFN (N, B, L, D), through the model's parts."""
  model = nnx.merge(model_graph(config), params)
  positions, segments = batch["positions_BxL"], batch["segment_ids_BxL"]
  x = params["embedding_VxD"][batch["tokens_BxL"]] * config.model_dim**0.5
  windows = layer_windows(config.attention, config.num_layers)
  inputs = []
  for block, window in zip(model.layers(), windows):
    y = block.attention(block.attention_norm(x), positions, segments, window,
                        None)[0]
    inputs.append(block.ffn_norm(x + block.attention_out_norm(y)))
    x = block(x, Layer(window, True), positions, segments, None, ())[0]
  return jnp.stack(inputs)


def in_float64(config, params, batch):
  """Inputs x, gate g, up u of each layer's neurons, and the tokens' mask."""
  ffn = params["blocks"]["ffn"]
  x, gate, up = (np.asarray(a, np.float64) for a in (
      ffn_inputs(config.model, params, batch), ffn["gate_DxF"], ffn["up_DxF"]))
  return (x, np.einsum("nbld,ndf->nblf", x, gate),
          np.einsum("nbld,ndf->nblf", x, up), batch["segment_ids_BxL"] > 0)


def weights_gradient(x, to_gate, to_up):
  """Gradients of one layer's gate and up matrices from those of g and u."""
  return (np.einsum("bld,blf->df", x, to_gate),
          np.einsum("bld,blf->df", x, to_up))


# L1.


@pytest.fixture(scope="module")
def l1(make_config, make_batch, initial_params):
  """For four reductions: the library's L1 and its gradients; by hand too.

  The first layer's FFN is silenced, so that the second one's L1 does not
  depend on it: both layers' gradients are then one product.
  """
  config = make_config()
  params, batch = initial_params(config), make_batch(config)
  params["blocks"]["ffn_out_norm"]["scale_D"] -= 1
  kinds = [(neurons, layers) for neurons in ("sum", "mean")
           for layers in ("sum", "mean")]

  @jax.jit
  def library(params, factor):
    def penalties(params):
      _, statistics, _ = nnx.merge(model_graph(config.model), params).hidden(
          batch["tokens_BxL"], batch["positions_BxL"],
          batch["segment_ids_BxL"], measures=("l1",))
      return jnp.stack([sparsity.penalty_sum(
          statistics, factor, make_config(**training("penalty.", **{
              "schedule": "constant", "over_neurons": neurons,
              "over_layers": layers}))) for neurons, layers in kinds])
    return penalties(params), jax.jacrev(penalties)(params)["blocks"]["ffn"]

  x, g, u, counts = in_float64(config, params, batch)
  r = np.maximum(g, 0)
  each = np.abs(r * u) * counts[..., None]
  sign = np.sign(u) * (g > 0) * counts[..., None]
  by_hand = {}
  for neurons, layers in kinds:
    scale = 0.3 / (1 if neurons == "sum" else NEURONS) / (
        1 if layers == "sum" else LAYERS)
    by_hand[neurons, layers] = scale * each.sum(), [
        weights_gradient(x[n], scale * sign[n] * u[n], scale * sign[n] * r[n])
        for n in range(LAYERS)]
  values, gradients = jax.device_get(library(params, 0.3))
  return by_hand, {kind: (values[i], {name: grad[i] for name, grad
                                      in gradients.items()})
                   for i, kind in enumerate(kinds)}


@pytest.mark.parametrize("layers", ["sum", "mean"])
@pytest.mark.parametrize("neurons", ["sum", "mean"])
def test_l1_and_its_gradient_against_float64(l1, neurons, layers):
  (value, by_layer), (ours, gradient) = (kind[neurons, layers] for kind in l1)
  np.testing.assert_allclose(ours, value, rtol=1e-6)
  for n, (gate, up) in enumerate(by_layer):
    for name, expected in (("gate_DxF", gate), ("up_DxF", up)):
      assert np.abs(expected).max() > 0
      np.testing.assert_allclose(gradient[name][n], expected, rtol=1e-4,
                                 atol=1e-5 * np.abs(expected).max())
  assert not gradient["down_FxD"].any()


def test_the_sums_of_penalties_by_hand(make_config):
  """Weights, and means over layers, of what was measured."""
  config = make_config(**training("penalty.", **PENALTIES))
  sums = {"l1": [3.0, 5.0], "adjacent": [2.0, 6.0],
          f"chunk_{CHUNK_LENGTH}": [0.5, 0.25]}
  total = sparsity.penalty_sum(Statistics(
      jnp.float32(9), {k: jnp.array(v) for k, v in sums.items()}), 0.1, config)
  assert float(total) == pytest.approx(
      0.1 * 4 + ADJACENT * 4 + CHUNK * 0.375, rel=1e-6)


# The whole loss.


@pytest.fixture(scope="module")
def penalized(make_config, take_step):
  return take_step(make_config(**training("penalty.", **PENALTIES)))


def l1_to_neurons(g, u, counts):
  r = np.maximum(g, 0)
  sign = np.sign(u) * (g > 0) * counts[..., None]
  return sign * u, sign * r


def adjacent_to_gate(g, segments):
  """Of mean over neurons of BCE(sigmoid(100 g_t+1), sigmoid(100 g_t))."""
  before, logits = 100 * g[:, :-1], 100 * g[:, 1:]
  after = 1 / (1 + np.exp(-logits))
  pairs = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  out = np.zeros_like(g)
  out[:, :-1] += (1 / (1 + np.exp(-before)) - after) * pairs[..., None]
  out[:, 1:] -= before * after * (1 - after) * pairs[..., None]
  return 100 * out / NEURONS


def chunk_to_gate(g, counts):
  """Of tokens times mean over neurons of 1 - prod(1 - p), chunk by chunk."""
  out = np.zeros_like(g)
  for first in range(0, g.shape[1], CHUNK_LENGTH):
    part = slice(first, first + CHUNK_LENGTH)
    r, counted = np.maximum(g[:, part], 0), counts[:, part, None]
    total = r.sum(-1, keepdims=True) + EPSILON
    p = r / total * counted
    spared = np.exp(np.log(1 - p + EPSILON).sum(1, keepdims=True))
    to_p = counted * spared / (1 - p + EPSILON) / NEURONS
    to_p *= counted.sum(1, keepdims=True)
    to_r = to_p / total - (to_p * r).sum(-1, keepdims=True) / total**2
    out[:, part] = to_r * (r > 0)
  return out


def test_penalties_add_their_gradient_by_hand(
    make_config, make_batch, take_step, initial_params, penalized):
  """On the last layer's gate and up, beside the cross-entropy's gradient.

  By hand: a mean over the batch's tokens, and over layers.
  """
  config = make_config()
  params, batch = initial_params(config), make_batch(config)
  plain = take_step(config)[0].params
  x, g, u, counts = (a[-1] for a in (*in_float64(config, params, batch)[:3],
                                     [batch["segment_ids_BxL"] > 0]))
  mean = 1 / counts.sum() / LAYERS
  assert counts.sum() != batch["weights_BxL"].sum()
  to_gate, to_up = l1_to_neurons(g, u, counts)
  to_gate = FACTOR * to_gate
  parts = [to_gate, ADJACENT * adjacent_to_gate(g, batch["segment_ids_BxL"]),
           CHUNK * chunk_to_gate(g, counts)]
  expected = weights_gradient(x, mean * sum(parts), mean * FACTOR * to_up)
  for part in parts:  # None is lost beside the others.
    share = weights_gradient(x, mean * part, part)[0]
    assert np.linalg.norm(share) > 0.03 * np.linalg.norm(expected[0])
  for name, grad in zip(("gate_DxF", "up_DxF"), expected):
    ours = (plain["blocks"]["ffn"][name]
            - penalized[0].params["blocks"]["ffn"][name])[-1]
    np.testing.assert_allclose(ours, grad, rtol=1e-3,
                               atol=1e-3 * np.abs(grad).max())


def assert_same_step(ours, reference, tolerance=5e-6):
  """Parameters after SGD, hence gradients; what was measured; what is kept."""
  for a, b in zip(ours, reference):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(
        x, y, atol=tolerance, rtol=tolerance), a, b)
  np.testing.assert_array_equal(ours[0].sparsity.idle_NxF,
                                reference[0].sparsity.idle_NxF)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_micro_batches_do_not_change_the_gradient(make_config, take_step,
                                                  penalized, count):
  config = make_config(**training("penalty.", **PENALTIES),
                       **training(micro_batches=count))
  assert_same_step(take_step(config), penalized)


@pytest.mark.parametrize("axes", [
    {"data": 1}, {"data": 2}, {"data": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2}], ids=["1", "2", "4", "8"])
def test_devices_do_not_change_the_gradient(make_config, take_step, penalized,
                                            axes):
  config = make_config(**training("penalty.", **PENALTIES),
                       **training("mesh.", **axes))
  devices = jax.devices()[:np.prod(list(axes.values()))]
  mesh = mesh_lib.make_mesh(config, devices)
  assert_same_step(take_step(config, mesh=mesh), penalized)


# Dead neurons.


def statistics_of(fired, active=0.5, tokens=1000):
  """Statistics whose layers have these active fractions (one, or N)."""
  sums = {"fired": jnp.asarray(fired, jnp.float32),
          "nonzero_hidden": jnp.full(LAYERS, active) * NEURONS * tokens}
  return Statistics(jnp.float32(tokens), sums)


def test_idle_counts_tokens_saturates_and_starts_again(make_config):
  config = make_config(**training("dead_neurons.", after_tokens=700))
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


def test_untracked_neurons_are_not_counted(make_config):
  config = make_config()
  assert "fired" not in sparsity.measures(config)
  state = sparsity.update(sparsity.init(config), jnp.int32(1),
                          statistics_of(np.zeros((LAYERS, NEURONS))), config)
  assert not state.idle_NxF.any()


# At this threshold most neurons fire in a few rows alone, or in none.
REPAIR = {"model.ffn.activation": "fatrelu", "model.ffn.threshold": 2.5,
          "training.dead_neurons.reinitialize": 0.5}


@pytest.fixture(scope="module")
def make_repaired(make_config, make_batch):
  """Dead after one and a half batches without firing."""
  tokens = int((make_batch(make_config())["segment_ids_BxL"] > 0).sum())
  return functools.partial(make_config, **REPAIR, **training(
      "dead_neurons.", after_tokens=tokens * 3 // 2))


@pytest.fixture(scope="module")
def repaired(make_repaired, take_step):
  return take_step(make_repaired(), steps=2)


def test_a_neuron_is_idle_unless_any_row_fires_it(make_repaired, make_batch,
                                                  initial_params, repaired):
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
                                                 repaired):
  config = make_repaired(**training(micro_batches=8))
  assert_same_step(take_step(config, steps=2), repaired, 1e-4)
  config = make_repaired(**training("mesh.", data=4, tensor=2))
  ours = take_step(config, mesh=mesh_lib.make_mesh(config), steps=2)
  assert_same_step(ours, repaired, 1e-4)


def reinitialized(config, dead_NxF, params, step=3):
  after = config.training.dead_neurons.after_tokens
  state = SparsityState(jnp.float32(0), jnp.where(dead_NxF, after, after - 1))
  return jax.device_get(sparsity.reinitialize(params, state, jnp.int32(step),
                                              config))


@pytest.mark.parametrize("shape, inputs", [("gated", WIDTH), ("spark", 16)])
def test_reinitialization_mixes_draws_into_dead_gates_alone(
    make_config, initial_params, shape, inputs):
  share, dead = 0.1, np.arange(NEURONS) % 4 != np.arange(LAYERS)[:, None]
  config = make_config(**{"model.ffn.shape": shape}, **training(
      "dead_neurons.", after_tokens=9, reinitialize=share))
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


def test_reinitialization_draws_by_seed_and_step(make_config,
                                                  initial_params):
  def gate(step, **keys):
    config = make_config(**training("dead_neurons.", after_tokens=9,
                                    reinitialize=1.0), **training(**keys))
    return reinitialized(config, np.ones((LAYERS, NEURONS), bool), params,
                         step)["blocks"]["ffn"]["gate_DxF"]
  params = initial_params(make_config())
  np.testing.assert_array_equal(gate(3), gate(3))
  assert (gate(3) != gate(4)).mean() > 0.99
  assert (gate(3) != gate(3, seed=1)).mean() > 0.99


def test_reinitialization_leaves_living_neurons_as_they_are(make_config,
                                                            initial_params):
  config = make_config(**training("dead_neurons.", after_tokens=9,
                                  reinitialize=0.1))
  params = jax.device_get(initial_params(config))
  jax.tree.map(np.testing.assert_array_equal, params, reinitialized(
      config, np.zeros((LAYERS, NEURONS), bool), params))


# The controller.


@pytest.fixture(scope="module")
def make_controller(make_config):
  keys = training("penalty.", schedule="controller", factor=1e-8, rate=1.2,
                  target_active_fraction=0.05)
  config = make_config(**keys)
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


RUN = {"model.num_layers": 1, **training(
    num_steps=12, log_every=1, eval_every=12, checkpoint_every=8,
    keep_checkpoints=3)}
PROGRESSIVE = {**RUN, **training(
    "penalty.", schedule="progressive", peaks=(0.01, 0.1, 0.6),
    boundaries=(2, 4, 11)), **training("dead_neurons.", after_tokens=150,
                                       reinitialize=0.1)}
CONTROLLER = {**RUN, **training(
    "penalty.", schedule="controller", factor=0.1, rate=1.5,
    target_active_fraction=0.2), **training("dead_neurons.",
                                            after_tokens=10**6)}


@pytest.fixture(scope="module", params=["progressive", "controller"])
def runs(request, make_config, tmp_path_factory):
  """Name, config; folder and end of a run, and of one resumed at step 8."""
  config = make_config(**(PROGRESSIVE if request.param == "progressive"
                          else CONTROLLER))
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
def test_the_controller_stays_where_it_can_return_from(make_config, active,
                                                       bound):
  """Out of reach for a thousand steps, the factor is neither 0 nor infinite."""
  config = make_config(**training("penalty.", schedule="controller",
                                  factor=0.5))
  update = jax.jit(lambda state: jax.lax.fori_loop(
      0, 1000, lambda i, state: sparsity.update(
          state, i, statistics_of(0, active), config), state))
  assert float(update(sparsity.init(config)).factor) == pytest.approx(bound)


def test_without_a_penalty_nothing_more_is_measured(make_config):
  config = make_config()
  assert sparsity.init(config).factor == 0
  assert sparsity.measures(config) == ("active_neurons", "nonzero_hidden")


@pytest.mark.parametrize("keys, first, second", [
    (dict(schedule="none"), 0.0, 0.0),
    (dict(schedule="constant", factor=0.5), 0.5, 0.5),
    (dict(schedule="progressive", peaks=(0.25, 0.5), boundaries=(1, 4)), 0.25,
     0.5),
    (dict(schedule="controller", factor=0.5), 0.5, 0.6)])
def test_the_first_two_steps_factors(make_config, keys, first, second):
  config = make_config(**training("penalty.", **keys))
  state = sparsity.init(config)
  assert float(state.factor) == first and state.factor.dtype == jnp.float32
  state = sparsity.update(state, jnp.int32(1), statistics_of(0), config)
  assert float(state.factor) == pytest.approx(second)
  assert state.factor.dtype == jnp.float32
