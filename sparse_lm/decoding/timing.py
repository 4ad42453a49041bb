"""How long decoding takes, and how long it would at the least."""

from collections.abc import Callable, Sequence
import dataclasses
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import FFNConfig, LinearInputsConfig, ModelConfig
from sparse_lm.configs import gemma2_2b, spark_2b
from sparse_lm.decoding.decoder import Decoder
from sparse_lm.decoding.layers import NeuronMajorFFN
from sparse_lm.decoding.samplers import Greedy
from sparse_lm.errors import UserError
from sparse_lm.kernels.sparse_ffn import choose
from sparse_lm.model import Transformer
from sparse_lm.model.ffn import FFN
from sparse_lm.model.transformer import compute_dtype

Result = dict[str, Any]


def seconds(run: Callable[[], Any], repeats: int = 7) -> float:
  """Median time of a call, its arrays ready, after one to warm up."""
  jax.block_until_ready(run())
  laps = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    laps.append(time.perf_counter() - start)
  return statistics.median(laps)


def read_bandwidth(size: int = 2**28) -> float:
  """Bytes a second at which the device reads a large array to add it up."""
  x = jnp.ones(size // 4, jnp.float32)
  total = jax.jit(jnp.sum)
  return size / seconds(lambda: total(x))


def _kernel() -> str:
  platform = jax.default_backend()
  kernel = choose(platform)
  if kernel is None:
    raise UserError(f"no sparse kernel for a {platform} yet: there is nothing "
                    "to time")
  return kernel


def _device() -> str:
  device = jax.devices()[0]
  return device.device_kind if device.platform != "cpu" else "CPU"


def _ffn_bytes(config: FFNConfig, model_dim: int, active: float,
               itemsize: int) -> float:
  """Weights that a layer reads, `active` of its neurons being needed."""
  gate_dim, up_dim = config.input_dims(model_dim)
  return itemsize * (gate_dim * config.num_neurons
                     + active * (up_dim + model_dim))


def _layers(config: FFNConfig, model_dim: int, count: int, skip: bool, dtype):
  """A jitted pass through `count` layers, and their parameters."""
  graphs, states = [], []
  for seed in range(count):
    ffn = FFN(config, LinearInputsConfig(), model_dim, nnx.Rngs(seed))
    graph, state = nnx.split(
        NeuronMajorFFN(ffn, True, _kernel()) if skip else ffn)
    graphs.append(graph)
    states.append(jax.tree.map(lambda x: x.astype(dtype), state))

  @jax.jit
  def run(states, x_Bx1xD):
    active = []
    for graph, state in zip(graphs, states):
      y, activity = nnx.merge(graph, state)(x_Bx1xD)
      # As a norm does between layers, so that scores keep their scale.
      x_Bx1xD = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
      if skip:
        active.append(activity.active_BxL.mean())
    return x_Bx1xD, active

  return run, states


def time_ffn(num_layers: int, tokens: Sequence[int]) -> Result:
  """Spark's feed-forward layer against the dense one of equal parameters."""
  spark, dense = spark_2b.get_config().model, gemma2_2b.get_config().model
  dtype, bandwidth = compute_dtype(spark), read_bandwidth()
  rows = []
  for batch in tokens:
    x = jax.random.normal(jax.random.key(0), (batch, 1, spark.model_dim), dtype)
    row = dict(tokens=batch)
    for name, model, skip in (("dense", dense, False), ("spark", spark, True)):
      run, states = _layers(model.ffn, model.model_dim, num_layers, skip, dtype)
      row[f"{name}_ms"] = 1e3 * seconds(lambda: run(states, x)) / num_layers
      active = model.ffn.num_neurons
      if skip:
        active = float(np.mean(jax.device_get(run(states, x)[1])))
        row["active_fraction"] = active / model.ffn.num_neurons
        # No two tokens need share a neuron: the union, were they independent.
        idle = (1 - active / model.ffn.num_neurons) ** batch
        active = (1 - idle) * model.ffn.num_neurons
      row[f"{name}_limit_ms"] = 1e3 / bandwidth * _ffn_bytes(
          model.ffn, model.model_dim, active, dtype.itemsize)
      run = states = None  # Freed before the next ones are made.
    row["speedup"] = row["dense_ms"] / row["spark_ms"]
    row["limit"] = row["dense_limit_ms"] / row["spark_limit_ms"]
    rows.append(row)
  return dict(suite="ffn", device=_device(), dtype=dtype.name,
              jax=jax.__version__, gigabytes_per_second=bandwidth / 1e9,
              rows=rows)


def _decode_bytes(model: ModelConfig, prompt: int, itemsize: int) -> float:
  """Weights and cache that one token's step reads."""
  a, n = model.attention, model.num_layers
  projections = model.model_dim * a.head_dim * (
      2 * a.num_query_heads + 2 * a.num_kv_heads)
  ffn = _ffn_bytes(model.ffn, model.model_dim, model.ffn.num_active, itemsize)
  cache = 2 * a.num_kv_heads * a.head_dim * prompt
  return n * (ffn + itemsize * (projections + cache)) + (
      itemsize * model.vocab_size * model.model_dim)


def _time_model(model: ModelConfig, prompts: Sequence[int],
                steps: int) -> dict[int, float]:
  """Seconds a token for each prompt's length, one token at a time."""
  params = nnx.to_pure_dict(nnx.state(
      jax.jit(lambda: Transformer(model, nnx.Rngs(0)))()))
  decoder = Decoder(model, params)
  del params
  laps = {}
  for prompt in prompts:
    tokens = [list(range(1, prompt + 1))]
    drawn = decoder.generate(tokens, steps + 2, Greedy(), jax.random.key(0))
    next(drawn), next(drawn)  # Compiled, and the prompt read.
    start = time.perf_counter()
    for _ in drawn:
      pass
    laps[prompt] = (time.perf_counter() - start) / steps
  return laps


def time_decode(num_layers: int, prompts: Sequence[int],
                steps: int = 24) -> Result:
  """Whole models, batch 1, token by token after prompts of some lengths."""
  _kernel()
  length = max(prompts) + steps + 2
  pair = {name: dataclasses.replace(
      module.get_config().model, num_layers=num_layers, context_length=length,
      attention=dataclasses.replace(module.get_config().model.attention,
                                    query_chunk=0))
          for name, module in (("dense", gemma2_2b), ("spark", spark_2b))}
  dtype, bandwidth = compute_dtype(pair["spark"]), read_bandwidth()
  laps = {name: _time_model(model, prompts, steps)
          for name, model in pair.items()}
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


def table(result: Result) -> str:
  """The rows for a terminal."""
  lines = [f"{result['suite']} on {result['device']}, {result['dtype']}, jax "
           f"{result['jax']}, {result['gigabytes_per_second']:.1f} GB/s read"]
  heads = list(result["rows"][0])
  lines.append("".join(f"{head:>16}" for head in heads))
  for row in result["rows"]:
    lines.append("".join(f"{row[head]:>16.3f}" if isinstance(row[head], float)
                         else f"{row[head]:>16,}" for head in heads))
  return "\n".join(lines)
