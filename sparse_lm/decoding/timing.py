"""How long decoding takes, and how long it would at the least."""

from collections.abc import Callable, Sequence
import dataclasses
import math
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import FFNConfig, LinearInputsConfig, ModelConfig
from sparse_lm.configs import gemma2_2b, spark_2b
from sparse_lm.decoding import torch_baseline
from sparse_lm.decoding.decoder import Decoder
from sparse_lm.decoding.layers import NeuronMajorFFN, make_select
from sparse_lm.decoding.samplers import Greedy
from sparse_lm.errors import UserError
from sparse_lm.model import Transformer
from sparse_lm.model.activity import DECODING
from sparse_lm.model.attention import layer_windows
from sparse_lm.model.ffn import FFN
from sparse_lm.model.transformer import compute_dtype

Result = dict[str, Any]
Log = Callable[[str], None]
_PASSES = 4  # through all layers, in a program that times them


def _seconds(run: Callable[[], Any]) -> float:
  """Median time of a call, which may return before its work is done.

  After one to warm up, of seven laps of as many calls as fill 50 ms.
  """
  def lap(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
      result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls

  lap(1)
  calls = max(1, round(0.05 / lap(1)))
  return statistics.median(lap(calls) for _ in range(7))


def read_bandwidth() -> float:
  """Bytes a second at which the device reads a large array to add it up."""
  size = 2**28 if jax.default_backend() == "cpu" else 2**32
  x = jnp.ones(size // 4, jnp.float32)
  total = jax.jit(jnp.sum)
  return size / _seconds(lambda: total(x))


def _device() -> str:
  device = jax.devices()[0]
  return device.device_kind if device.platform != "cpu" else "CPU"


def _ffn_bytes(config: FFNConfig, model_dim: int, active: float,
               itemsize: int) -> float:
  """Weights that a layer reads, `active` of its neurons being needed."""
  gate_dim, up_dim = config.input_dims(model_dim)
  return itemsize * (gate_dim * config.num_neurons
                     + active * (up_dim + model_dim))


def _tiled(scores: np.ndarray, neurons: int) -> np.ndarray:
  """Scores (N, T, F) for so many neurons, repeated until there are as many."""
  repeats = -(-neurons // scores.shape[-1])
  return np.tile(scores, repeats)[..., :neurons]


def _inputs(batch: int, model_dim: int, dtype, scores: np.ndarray | None
            ) -> jax.Array:
  """Tokens (B, 1, D). With scores, token i selects column i of the gate."""
  x = jax.random.normal(jax.random.key(0), (batch, 1, model_dim), dtype)
  if scores is None:
    return x
  chosen = jax.nn.one_hot(jnp.arange(batch), scores.shape[1], dtype=dtype)
  return x.at[:, 0, :scores.shape[1]].set(chosen)


def _layers(config: FFNConfig, model_dim: int, count: int, skip: bool, dtype,
            scores: np.ndarray | None = None):
  """Jitted passes, several and one; their layers' parameters; a layer.

  Args:
    config: of a layer.
    model_dim: D.
    count: of layers.
    skip: inactive neurons, where that is faster.
    dtype: of the parameters.
    scores: (N, T, F), columns of each layer's gate, whose others are then 0;
      None: of N(0, 1 / R).
  """
  graphs, states = [], []
  for seed in range(count):
    ffn = FFN(config, LinearInputsConfig(), model_dim, nnx.Rngs(seed))
    if scores is not None:
      columns = scores[seed]
      gate_DxF = jnp.zeros_like(ffn.gate_DxF[...])
      ffn.gate_DxF[...] = gate_DxF.at[:len(columns)].set(columns)
    ffn = NeuronMajorFFN(ffn, True, None) if skip else ffn
    graph, state = nnx.split(ffn)
    graphs.append(graph)
    states.append(jax.tree.map(lambda x: x.astype(dtype), state))

  def chain(x_Bx1xD, y_Bx1xD):
    """What the next layer multiplies, once this one is done; what is left."""
    if skip:  # No kernel of XLA's stands between kernels.
      return jax.lax.optimization_barrier((x_Bx1xD, y_Bx1xD))
    x_Bx1xD = jnp.sign(y_Bx1xD)  # By the kernel that adds the last sums up.
    return x_Bx1xD, x_Bx1xD

  def one_pass(states, x_Bx1xD):
    outputs, active = [], []
    for graph, state in zip(graphs, states):
      y_Bx1xD, activity = nnx.merge(graph, state)(x_Bx1xD)
      x_Bx1xD, y_Bx1xD = chain(x_Bx1xD, y_Bx1xD)
      outputs.append(y_Bx1xD)
      counted = activity.measure(DECODING, jnp.ones(x_Bx1xD.shape[:2], bool),
                                 None)
      active.append(counted[DECODING[0]])
    return (x_Bx1xD, outputs), active

  @jax.jit
  def run(states, x_Bx1xD):
    # Many in a program, or a GPU waits for the host to start each.
    return jax.lax.fori_loop(
        0, _PASSES, lambda _, carry: one_pass(states, carry[0])[0],
        (x_Bx1xD, [x_Bx1xD] * count))

  return run, jax.jit(one_pass), states, nnx.merge(graphs[0], states[0])


def _time_layers(config: FFNConfig, model_dim: int, num_layers: int, skip: bool,
                 dtype: jnp.dtype, tokens: Sequence[int], log: Log,
                 scores: np.ndarray | None = None) -> list[Result]:
  """Microseconds a layer, active neurons a token and the kernel, by tokens."""
  run, one_pass, states, layer = _layers(config, model_dim, num_layers, skip,
                                         dtype, scores)
  rows = []
  for batch in tokens:
    x = _inputs(batch, model_dim, dtype, scores)
    us = 1e6 * _seconds(lambda: run(states, x)) / (_PASSES * num_layers)
    active = jax.device_get(one_pass(states, x)[1])
    kernel = skip and layer.chosen(x[:, 0]) or "dense"
    log(f"{config.shape} layer, {batch} token(s), {kernel}: {us:.1f} us")
    rows.append(dict(us=us, active=float(np.mean(active)) / batch,
                     kernel=kernel))
  return rows


# What the suites of one layer compare: sparse first, then dense.
def _pair(suite: str) -> tuple[FFNConfig, FFNConfig, int]:
  spark, dense = spark_2b.get_config().model, gemma2_2b.get_config().model
  if suite == "ffn":
    return spark.ffn, dense.ffn, dense.model_dim
  # Scores are N(0, 1): 1% exceed the threshold.
  relu = dataclasses.replace(dense.ffn, activation="fatrelu", threshold=2.326)
  return relu, dense.ffn, dense.model_dim


def _union(config: FFNConfig, model_dim: int, scores: np.ndarray) -> float:
  """The fraction of neurons that some token activates, mean over layers."""
  ffn = nnx.eval_shape(
      lambda: FFN(config, LinearInputsConfig(), model_dim, nnx.Rngs(0)))
  active_NxTxF = make_select(ffn, True)(jnp.asarray(scores, jnp.float32)) != 0
  return float(active_NxTxF.any(1).mean())


def time_ffn(suite: str, num_layers: int, tokens: Sequence[int], log: Log,
             scores: np.ndarray | None = None) -> Result:
  """A sparse feed-forward layer against the dense one of equal parameters.

  Args:
    suite: "ffn", Spark's at 8%; or "relu_ffn", gated, no predictor, at 1%.
    num_layers: distinct ones, one after another in a program.
    tokens: how many at a time, row by row.
    log: is told what has been timed.
    scores: (N, T, F) of a trained model's layers, which say which neurons are
      active; None: weights are random.

  Raises:
    UserError: on more tokens than a predictor with such scores can tell apart.
  """
  sparse, dense, model_dim = _pair(suite)
  dtype = compute_dtype(spark_2b.get_config().model)
  bandwidth = read_bandwidth()
  if scores is not None:
    width, _ = sparse.input_dims(model_dim)
    if max(tokens) > width:
      raise UserError(f"--tokens={max(tokens)}: with --scores at most {width}")
    layers = np.arange(num_layers) % len(scores)
    scores = _tiled(scores[layers, :max(tokens)], sparse.num_neurons)
  timed = dict(
      dense=_time_layers(dense, model_dim, num_layers, False, dtype, tokens,
                         log),
      sparse=_time_layers(sparse, model_dim, num_layers, True, dtype, tokens,
                          log, scores))
  rows = []
  for i, batch in enumerate(tokens):
    torch_us = torch_baseline.dense_ffn_microseconds(
        model_dim, dense.num_neurons, num_layers, batch, dtype.name, log)
    active = timed["sparse"][i]["active"] / sparse.num_neurons
    if scores is None:  # The tokens are independent.
      union = 1 - (1 - active) ** batch
    else:
      union = _union(sparse, model_dim, scores[:, :batch])
    limits = {name: 1e6 / bandwidth * _ffn_bytes(
        config, model_dim, needed, dtype.itemsize) for name, config, needed in (
            ("dense", dense, dense.num_neurons),
            ("sparse", sparse, union * sparse.num_neurons))}
    row = dict(tokens=batch, dense_us=timed["dense"][i]["us"])
    if torch_us is not None:
      row["torch_us"] = torch_us
    best = min(row["dense_us"], torch_us or math.inf)
    rows.append(row | dict(
        sparse_us=timed["sparse"][i]["us"],
        kernel=timed["sparse"][i]["kernel"],
        active_fraction=active, union_fraction=union,
        dense_limit_us=limits["dense"],
        sparse_limit_us=limits["sparse"],
        speedup=best / timed["sparse"][i]["us"],
        limit=limits["dense"] / limits["sparse"]))
  active_sets = "random" if scores is None else "trained"
  return dict(suite=suite, active_sets=active_sets, layers=num_layers,
              device=_device(),
              dtype=dtype.name, jax=jax.__version__,
              gigabytes_per_second=bandwidth / 1e9, rows=rows)


def _decode_bytes(model: ModelConfig, prompt: int, itemsize: int) -> float:
  """Weights and cache that one token's step reads."""
  a = model.attention
  projections = model.model_dim * a.head_dim * (
      2 * a.num_query_heads + 2 * a.num_kv_heads)
  ffn = _ffn_bytes(model.ffn, model.model_dim, model.ffn.num_active, itemsize)
  group, cache = a.num_query_heads // a.num_kv_heads, 0
  for window in layer_windows(a, model.num_layers):
    seen = kept = min(prompt, window)
    if a.shape == "spark":  # Were no two queries to share a key.
      kept = min(seen, group * a.top_k)
    cache += a.num_kv_heads * (
        a.predictor_dim * seen + (2 * a.head_dim - a.predictor_dim) * kept)
  return model.num_layers * (ffn + itemsize * projections) + itemsize * (
      cache + model.vocab_size * model.model_dim)


def _time_model(model: ModelConfig, prompts: Sequence[int], steps: int
                ) -> dict[int, float]:
  """Median seconds a token, one at a time, for each prompt's length."""
  params = nnx.to_pure_dict(nnx.state(
      jax.jit(lambda: Transformer(model, nnx.Rngs(0)))()))
  decoder = Decoder(model, params, measure=False)
  del params

  def lap(prompt: int) -> float:
    drawn = decoder.generate([list(range(1, prompt + 1))], steps + 2, Greedy(),
                             jax.random.key(0))
    next(drawn), next(drawn)  # The prompt has been read.
    start = time.perf_counter()
    for _ in drawn:
      pass
    return (time.perf_counter() - start) / steps

  # The first round compiles. In turn, so that what slows the machine for a
  # while does not slow one length alone.
  _, *rounds = [[lap(prompt) for prompt in prompts] for _ in range(6)]
  return dict(zip(prompts, map(statistics.median, zip(*rounds))))


def time_decode(num_layers: int, prompts: Sequence[int], log: Log,
                steps: int = 24) -> Result:
  """Whole models, batch 1, token by token after prompts of some lengths.

  Args:
    num_layers: of each model.
    prompts: how many tokens.
    log: is told what has been timed.
    steps: tokens of a lap.
  """
  length = max(prompts) + steps + 2
  pair = {name: dataclasses.replace(
      module.get_config().model, num_layers=num_layers, context_length=length,
      attention=dataclasses.replace(module.get_config().model.attention,
                                    query_chunk=0))
          for name, module in (("dense", gemma2_2b), ("spark", spark_2b))}
  dtype, bandwidth = compute_dtype(pair["spark"]), read_bandwidth()
  laps = {}
  for name, model in pair.items():
    laps[name] = _time_model(model, prompts, steps)
    for prompt, lap in laps[name].items():
      log(f"{name} model, {prompt} tokens: {1e3 * lap:.2f} ms a token")
  rows = []
  for prompt in prompts:
    row = dict(prompt=prompt)
    for name, model in pair.items():
      row[f"{name}_ms"] = 1e3 * laps[name][prompt]
      row[f"{name}_limit_ms"] = 1e3 / bandwidth * _decode_bytes(
          model, prompt, dtype.itemsize)
    row["speedup"] = row["dense_ms"] / row["spark_ms"]
    row["limit"] = row["dense_limit_ms"] / row["spark_limit_ms"]
    rows.append(row)
  return dict(suite="decode", layers=num_layers, device=_device(),
              dtype=dtype.name, jax=jax.__version__,
              gigabytes_per_second=bandwidth / 1e9, rows=rows)
