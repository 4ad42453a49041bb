"""One training step, one evaluation step: pure functions to be jitted."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from sparse_lm.config import Config
from sparse_lm.model import Transformer, activity
from sparse_lm.model.transformer import Statistics, model_graph
from sparse_lm.training import sparsity
from sparse_lm.training.loss import loss_sums

Batch = dict[str, jax.Array]  # as data/pipeline.py makes them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that training changes. Random keys derive from the seed and `step`."""

  step: jax.Array  # steps taken
  params: Any  # nested dict; a leaf's name ends in its axes
  optimizer: Any
  sparsity: sparsity.SparsityState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """What a pass over some tokens adds up to; `+` joins micro-batches."""

  loss: jax.Array  # cross-entropy, nats
  z_loss: jax.Array  # log(Z)^2
  tokens: jax.Array  # predictions that count
  text_bytes: jax.Array  # bytes of text that they stand for
  statistics: Statistics

  def __add__(self, other: "Sums") -> "Sums":
    return jax.tree.map(jnp.add, self, other)


def init_params(config: Config) -> Any:
  """Fresh parameters from the seed, as a nested dict."""
  model = Transformer(config.model, nnx.Rngs(config.training.seed))
  return nnx.to_pure_dict(nnx.state(model))


def abstract_params(config: Config) -> Any:
  """Shapes and types of `init_params`."""
  return jax.eval_shape(lambda: init_params(config))


def init_state(config: Config,
               optimizer: optax.GradientTransformation) -> TrainState:
  """A fresh state from the seed. Jit it with shardings to create it sharded."""
  params = init_params(config)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params),
                    sparsity.init(config))


def forward(model: Transformer, batch: Batch, text_bytes_V: jax.Array,
            loss_chunk: int, measures: Sequence[str]) -> Sums:
  """Loss and sparsity of a batch, as sums over its tokens.

  Args:
    model: with its parameters.
    batch: as data/pipeline.py makes it.
    text_bytes_V: bytes of text that each token stands for.
    loss_chunk: positions whose logits are alive at a time; 0: all.
    measures: what is measured of the neurons, see model/activity.py.
  """
  x_BxLxD, statistics, _ = model.hidden(
      batch["tokens_BxL"], batch["positions_BxL"], batch["segment_ids_BxL"],
      measures=measures)
  targets_BxL, weights_BxL = batch["targets_BxL"], batch["weights_BxL"]
  loss, z_loss = loss_sums(model, x_BxLxD, targets_BxL, weights_BxL,
                           loss_chunk)
  text_bytes = (jnp.take(text_bytes_V, targets_BxL) * weights_BxL).sum()
  return Sums(loss, z_loss, weights_BxL.sum(), text_bytes, statistics)


def _micro_batches(batch: Batch, count: int) -> Batch:
  """(B, ...) to (count, B / count, ...), each spread over all devices.

  Row b goes to micro-batch b % count, so that a device's rows, which are
  neighbours, stay on it.
  """
  return jax.tree.map(
      lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def make_train_step(config: Config, optimizer: optax.GradientTransformation,
                    learning_rate: optax.Schedule, text_bytes_V: jax.Array
                    ) -> Callable[[TrainState, Batch], tuple]:
  """`(state, batch) -> (state, metrics)`.

  Loss and penalties are sums over tokens divided by the whole batch's token
  count, so the gradient does not depend on how the batch is split over
  micro-batches or devices.
  """
  training, graph = config.training, model_graph(config.model)
  measures = sparsity.measures(config)

  def loss_fn(params, batch, predictions, tokens, factor):
    sums = forward(nnx.merge(graph, params), batch, text_bytes_V,
                   training.loss_chunk, measures)
    penalty = sparsity.penalty_sum(sums.statistics, factor, config)
    return ((sums.loss + training.z_loss * sums.z_loss) / predictions
            + penalty / tokens), sums

  def gradients(params, batch, factor):
    predictions = jnp.maximum(batch["weights_BxL"].sum(), 1)
    tokens = jnp.maximum((batch["segment_ids_BxL"] > 0).sum(), 1)
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if training.micro_batches == 1:
      return grad_fn(params, batch, predictions, tokens, factor)

    def gradients_of(part):
      return grad_fn(params, part, predictions, tokens, factor)

    def add(total, part):
      return jax.tree.map(jnp.add, total, gradients_of(part)), None

    parts = _micro_batches(batch, training.micro_batches)
    shapes = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  def train_step(state: TrainState, batch: Batch):
    grads, sums = gradients(state.params, batch, state.sparsity.factor)
    updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    after = sparsity.update(state.sparsity, step, sums.statistics, config)
    metrics = dict(
        sums=_without_neurons(sums),
        gradient_norm=optax.global_norm(grads),
        parameter_norm=optax.global_norm(params),
        learning_rate=jnp.asarray(learning_rate(state.step), jnp.float32),
        penalty_factor=state.sparsity.factor)
    if training.dead_neurons.after_tokens:
      metrics["dead_fraction_N"] = sparsity.dead_neurons(after, config).mean(-1)
    if training.dead_neurons.reinitialize:
      params = sparsity.reinitialize(params, after, step, config)
    return TrainState(step, params, opt_state, after), metrics

  return train_step


def _without_neurons(sums: Sums) -> Sums:
  """Without what is kept for each neuron: too much to fetch every step."""
  statistics = sums.statistics
  kept = {name: x for name, x in statistics.sums.items() if x.ndim == 1}
  return dataclasses.replace(
      sums, statistics=dataclasses.replace(statistics, sums=kept))


def make_eval_step(config: Config, text_bytes_V: jax.Array
                   ) -> Callable[[Any, Batch], Sums]:
  """`(params, batch) -> Sums`, in micro-batches as training is."""
  training, graph = config.training, model_graph(config.model)

  def eval_step(params, batch):
    def run(part):
      return forward(nnx.merge(graph, params), part, text_bytes_V,
                     training.loss_chunk, activity.REPORT)

    parts = jax.lax.map(run, _micro_batches(batch, training.micro_batches))
    return jax.tree.map(lambda x: x.sum(0), parts)

  return eval_step
