"""How long the sparse parts of a training step take, and in how much memory."""

from collections.abc import Callable, Sequence
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.config import AttentionConfig
from sparse_lm.kernels.devices import is_hopper
from sparse_lm.kernels.gaussian import quantile
from sparse_lm.kernels.spark_attention import choose as choose_attention
from sparse_lm.kernels.spark_attention import spark_attention
from sparse_lm.kernels.statistical_topk import choose, gated_topk
from sparse_lm.model import sparsify
from sparse_lm.model.attention import mix, spark_weights, visible

Result = dict[str, Any]
_EVERYTHING = 2**30  # A window that no sequence fills.


def _compile(f: Callable, arguments: Sequence[jax.Array]):
  """The program, and the bytes of its temporaries."""
  compiled = jax.jit(f).lower(*arguments).compile()
  return compiled, compiled.memory_analysis().temp_size_in_bytes


def _milliseconds(programs: dict[str, Callable], arguments, laps: int = 7,
                  calls: int = 10) -> dict[str, float]:
  """Median time of a call of each program, in turns so that drifts cancel."""
  times = {name: [] for name in programs}
  for lap in range(laps + 1):
    for name, program in programs.items():
      start = time.perf_counter()
      for _ in range(calls):
        out = program(*arguments)
      jax.block_until_ready(out)
      if lap:  # The first one warms up.
        times[name].append((time.perf_counter() - start) / calls)
  return {name: 1e3 * statistics.median(x) for name, x in times.items()}


def _with_gradient(f: Callable) -> Callable:
  """f's value and its gradients, of arguments whose last is f's gradient."""
  def run(*arguments):
    out, pull = jax.vjp(f, *arguments[:-1])
    # In training the gradient comes after the whole forward pass. Without this
    # XLA makes one pass over memory of a part of both.
    gradient = jax.lax.optimization_barrier((out, arguments[-1]))[1]
    return out, pull(gradient)
  return run


def _device() -> dict[str, str]:
  return dict(device=jax.devices()[0].device_kind, dtype="bfloat16",
              jax=jax.__version__)


def _swap(x: jax.Array) -> jax.Array:
  """(B, heads, L, E) to (B, L, heads, E) and back."""
  return x.swapaxes(1, 2)


def _attentions(config: AttentionConfig, length: int,
                blocks: Sequence[tuple[int, int]],
                fastest: str) -> dict[str, Callable]:
  """Causal attentions of query (B, K, G, L, E), key and value (B, K, L, E).

  Spark's are materialised, in XLA by `blocks`, and `fastest` if another.
  """
  positions_1xL = jnp.arange(length)[None]

  def dense(query, key, value, implementation):
    b, k, g, l, e = query.shape
    mixed = jax.nn.dot_product_attention(
        _swap(query.reshape(b, k * g, l, e)), _swap(key), _swap(value),
        is_causal=True, implementation=implementation)
    return _swap(mixed).reshape(query.shape)

  def materialised(query, key, value):
    seen = visible(positions_1xL, positions_1xL, None, None, _EVERYTHING)
    return mix(spark_weights(query, key, seen, config)[0], value)

  def blockwise(query, key, value, **options):
    return spark_attention(
        query, key, value, positions_1xL, None, _EVERYTHING,
        predictor_dim=config.predictor_dim, top_k=config.top_k,
        softcap=config.logit_softcap, **options)[0]

  forms = {"dense": functools.partial(dense, implementation="xla")}
  # JAX refuses wider heads than 128 on GPUs before Hopper.
  if jax.default_backend() == "gpu" and (
      config.head_dim <= 128 or is_hopper(jax.devices()[0])):
    forms["dense_cudnn"] = functools.partial(dense, implementation="cudnn")
  forms["spark_materialised"] = materialised
  for q, k in blocks:
    forms[f"spark_{q}x{k}"] = functools.partial(
        blockwise, block_q=q, block_k=k, implementation="xla")
  if fastest != "xla":
    forms[f"spark_{fastest}"] = functools.partial(
        blockwise, implementation=fastest)
  return forms


def time_attention(lengths: Sequence[int], blocks: Sequence[tuple[int, int]],
                   query_heads: int = 8, kv_heads: int = 4,
                   head_dim: int = 256) -> Result:
  """Attention of one sequence in bfloat16, forward and with its backward pass.

  Args:
    lengths: tokens.
    blocks: queries x keys of the blockwise form's blocks.
    query_heads: H.
    kv_heads: K.
    head_dim: E, half of which predict.
  """
  config = AttentionConfig(
      num_query_heads=query_heads, num_kv_heads=kv_heads, head_dim=head_dim,
      predictor_dim=head_dim // 2)
  rows = []
  for length in lengths:
    draws = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, kv_heads, query_heads // kv_heads, length, head_dim),
              *[(1, kv_heads, length, head_dim)] * 2]
    query, key, value, d_out = (
        jax.random.normal(draw, shape, jnp.bfloat16)
        for draw, shape in zip(draws, [*shapes, shapes[0]]))
    fastest = choose_attention(jax.devices()[0], query, value,
                               config.predictor_dim)
    forms = _attentions(config, length, blocks, fastest)
    forward, forward_bytes, both, both_bytes = {}, {}, {}, {}
    for name, form in forms.items():
      forward[name], forward_bytes[name] = _compile(form, (query, key, value))
      both[name], both_bytes[name] = _compile(_with_gradient(form),
                                              (query, key, value, d_out))
    forward_ms = _milliseconds(forward, (query, key, value))
    both_ms = _milliseconds(both, (query, key, value, d_out))
    rows += [dict(tokens=length, attention=name, forward_ms=forward_ms[name],
                  forward_MB=forward_bytes[name] / 1e6, both_ms=both_ms[name],
                  both_MB=both_bytes[name] / 1e6) for name in forms]
  return dict(_device(), suite="attention_training", rows=rows)


def _gates(k: int, score: jax.ShapeDtypeStruct) -> dict[str, Callable]:
  """From scores and the other branch, both like `score`, to what `down` reads.

  gated_*: `gated_topk` by its implementations here, one function of both. The
  others make a top-k of the scores and leave the rest to XLA.
  """
  def above(kth, score_TxF):
    return jnp.where(score_TxF >= jax.lax.stop_gradient(kth(score_TxF)),
                     score_TxF, 0)

  def separate(sparsifier, score_TxF, up_TxF):
    return jax.nn.gelu(sparsifier(score_TxF)) * up_TxF

  sparsifiers = {
      "none": lambda score_TxF: score_TxF,
      "statistical": lambda score_TxF: sparsify.statistical_topk(score_TxF, k),
      "top_k": functools.partial(
          above, lambda x: jax.lax.top_k(x, k)[0][..., -1:]),
      "approx_max_k": functools.partial(
          above, lambda x: jax.lax.approx_max_k(
              x, k, recall_target=0.5)[0][..., -1:])}
  gates = {name: functools.partial(separate, sparsifier)
           for name, sparsifier in sparsifiers.items()}
  fastest = choose(jax.devices()[0], score, score, jax.nn.gelu)
  for name in dict.fromkeys(("xla", fastest)):
    gates[f"gated_{name}"] = functools.partial(
        gated_topk, quantile=quantile(k, score.shape[-1]),
        activation=jax.nn.gelu, implementation=name)
  return gates


def time_topk(tokens: int, model_dim: int, neurons: int,
              predictor_dim: int) -> Result:
  """Spark's feed-forward layer in bfloat16, forward and backward, by top-k.

  8% of the neurons are kept. "none" is the layer without a top-k.

  Args:
    tokens: T.
    model_dim: D.
    neurons: F.
    predictor_dim: R.
  """
  draws = jax.random.split(jax.random.key(0), 5)
  rest = model_dim - predictor_dim

  def draw(key, *shape):
    return jax.random.normal(key, shape, jnp.bfloat16) * shape[0]**-0.5

  x_TxD, d_out = (tokens**0.5 * draw(key, tokens, model_dim)
                  for key in draws[:2])
  weights = (draw(draws[2], predictor_dim, neurons),
             draw(draws[3], rest, neurons), draw(draws[4], neurons, model_dim))

  def layer(gate, x_TxD, gate_RxF, up_UxF, down_FxD):
    x_TxR, x_TxU = jnp.split(x_TxD, [predictor_dim], axis=-1)
    return gate(x_TxR @ gate_RxF, x_TxU @ up_UxF) @ down_FxD

  programs, sizes = {}, {}
  score = jax.ShapeDtypeStruct((tokens, neurons), jnp.bfloat16)
  for name, gate in _gates(round(0.08 * neurons), score).items():
    programs[name], sizes[name] = _compile(
        _with_gradient(functools.partial(layer, gate)),
        (x_TxD, *weights, d_out))
  times = _milliseconds(programs, (x_TxD, *weights, d_out))
  rows = [dict(topk=name, ms=ms, ratio=ms / times["none"], MB=sizes[name] / 1e6)
          for name, ms in times.items()]
  return dict(_device(), suite="topk_training", tokens=tokens, rows=rows)
