"""Prefill, then one jitted step per token with a cache that stays in place."""

from collections.abc import Iterator, Sequence
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import ModelConfig
from sparse_lm.decoding.attention import (CachedAttention, choose_attention,
                                          decoding_cache)
from sparse_lm.decoding.block import AddNorm, DecodingBlock
from sparse_lm.decoding.layers import NeuronMajorFFN, can_skip
from sparse_lm.decoding.samplers import Sampler
from sparse_lm.errors import UserError
from sparse_lm.kernels.devices import unserved
from sparse_lm.kernels.sparse_ffn import IMPLEMENTATIONS
from sparse_lm.model import activity
from sparse_lm.model.transformer import Statistics, model_graph, unstack

# Caches hold a multiple of so many tokens: a kernel's thread block reads them.
_SLOTS = 64


def _bucket(length: int, limit: int) -> int:
  """The next power of two, at most `limit`: few shapes, few compilations."""
  return min(limit, max(16, 1 << (length - 1).bit_length()))


def _check_implementation(name: str | None) -> None:
  if name is None:
    return
  if name not in IMPLEMENTATIONS:
    raise UserError(f"--ffn_implementation={name}: is not one of "
                    f"{', '.join(IMPLEMENTATIONS)}")
  if reason := unserved(jax.devices()[0], name):
    raise UserError(f"--ffn_implementation={name}: {reason}")


class Decoder:
  """A model laid out for decoding.

  The parameters are laid out once, here: one block a layer, neuron-major where
  inactive neurons are skipped, in the type that the model computes in.

  Attributes:
    ffn_implementations: of each layer in the newest `generate`: "dense", or the
      kernel that skips inactive neurons, token by token after the prompt.
    attention_implementations: likewise, of keys.
    statistics: of the newest `generate`.
  """

  def __init__(self, config: ModelConfig, params: Any, *,
               skip_inactive: bool = True,
               ffn_implementation: str | None = None,
               prefill_chunk: int = 512, measure: bool = True):
    """Lays out a model's parameters.

    Args:
      config: the model's.
      params: as training has them.
      skip_inactive: False computes every neuron and key, to compare with. So
        does True where no kernel is faster (see `choose` of
        `kernels.sparse_ffn` and `kernels.sparse_attention`).
      ffn_implementation: of `kernels.sparse_ffn.IMPLEMENTATIONS`; None: the
        fastest here.
      prefill_chunk: prompts are fed in pieces of at most so many tokens, which
        bounds the memory of their attention scores.
      measure: False keeps no statistics.

    Raises:
      UserError: on an implementation that is unknown, or not for this device.
    """
    _check_implementation(ffn_implementation)
    model = unstack(nnx.merge(model_graph(config), params))
    self.config = config
    self.ffn_implementations, self.attention_implementations = [], []
    self._skip_keys, self._chunk = skip_inactive, prefill_chunk
    blocks, before = [], None
    for block, sparse in zip(model.blocks, config.sparse_layers):
      block.attention = CachedAttention(block.attention)
      if skip_inactive and can_skip(block.ffn, sparse):
        block.ffn = NeuronMajorFFN(block.ffn, sparse, ffn_implementation)
      blocks.append(DecodingBlock(block, before))
      before = block.ffn_out_norm
    model.blocks = nnx.List(blocks)
    model.final_norm = AddNorm(before, model.final_norm)
    self.statistics: Statistics | None = None  # of the newest `generate`
    self._dtype = model.dtype
    self._graph, params = nnx.split(model)
    # Norms' scales, the vectors, are used in float32.
    self._params = jax.tree.map(
        lambda x: x.astype(self._dtype) if x.ndim > 1 else x, params)
    # GPUs and TPUs wait for the host otherwise; with a CPU, tokens come slowly
    # enough to be shown one by one.
    self._count = 1 if jax.default_backend() == "cpu" else 8
    self._feed = jax.jit(functools.partial(self._step, self._graph, measure),
                         static_argnums=7, donate_argnums=1)
    self._advance = jax.jit(
        functools.partial(self._steps, self._graph, measure, self._count),
        static_argnums=7, donate_argnums=1)

  def _choose_ffns(self, batch: int) -> list[str]:
    """What each layer does with one token a row.

    Raises:
      UserError: where the kernel that was asked for cannot serve.
    """
    x_BxD = jax.ShapeDtypeStruct((batch, self.config.model_dim), self._dtype)
    names = []
    for block in nnx.merge(self._graph, self._params).blocks:
      ffn = block.ffn
      name = ffn.chosen(x_BxD) if isinstance(ffn, NeuronMajorFFN) else None
      # What is chosen can serve; what was asked for may not.
      reason = name and ffn.implementation and ffn.unsupported(name, x_BxD)
      if reason:
        raise UserError(f"--ffn_implementation={name}: {reason}")
      names.append(name or "dense")
    return names

  @staticmethod
  def _step(graph, measure, params, carry, tokens_BxL, start_B, last_B, key,
            draw, sampler):
    """Feeds L tokens a row; the cache then holds them.

    Args:
      graph: the model without its parameters.
      measure: whether to add statistics up.
      params: the model's.
      carry: the cache, and statistics to add to or None; donated.
      tokens_BxL: the tokens, from position `start_B` on.
      start_B: each row's first position.
      last_B: which of the L outputs the next token is drawn from.
      key: of all draws.
      draw: which draw this is.
      sampler: static.

    Returns:
      The next token (B,), the cache and statistics.
    """
    cache, earlier = carry
    positions_BxL = start_B[:, None] + jnp.arange(tokens_BxL.shape[1])
    model = nnx.merge(graph, params)
    x_BxLxD, statistics, cache = model.hidden(
        tokens_BxL, positions_BxL, cache=cache, measures=activity.DECODING)
    last_Bx1xD = jnp.take_along_axis(x_BxLxD, last_B[:, None, None], axis=1)
    logits_BxV = model.unembed(last_Bx1xD)[:, 0]
    if not measure:
      statistics = None
    elif earlier is not None:
      statistics = jax.tree.map(jnp.add, earlier, statistics)
    drawn_B = sampler(logits_BxV, jax.random.fold_in(key, draw))
    return drawn_B, (cache, statistics)

  @classmethod
  def _steps(cls, graph, measure, count, params, carry, token_B, start_B, key,
             draw, wanted, sampler):
    """Draws `count` tokens a row, feeding each to draw the next.

    Args:
      graph: as for `_step`, like what is not named here.
      measure: whether to add statistics up.
      count: static.
      params: the model's.
      carry: as for `_step`; donated.
      token_B: the newest of each row.
      start_B: its position.
      key: of all draws.
      draw: which draw the first one is.
      wanted: how many of them statistics are to count.
      sampler: static.

    Returns:
      The last token (B,), what `_step` carries, and all tokens (count, B).
    """
    def body(state, i):
      token_B, carry = state
      token_B, (cache, sums) = cls._step(
          graph, measure, params, carry, token_B[:, None], start_B + i,
          jnp.zeros_like(start_B), key, draw + i, sampler)
      sums = jax.tree.map(lambda new, old: jnp.where(i < wanted, new, old),
                          sums, carry[1])
      return (token_B, (cache, sums)), token_B

    (token_B, carry), tokens_TxB = jax.lax.scan(body, (token_B, carry),
                                                jnp.arange(count))
    return token_B, carry, tokens_TxB

  def _check(self, prompts: Sequence[Sequence[int]], max_new: int) -> None:
    longest, limit = max(map(len, prompts)), self.config.context_length
    if not min(map(len, prompts)):
      raise UserError("--prompt: must hold at least one token")
    if longest >= limit:
      raise UserError(f"--prompt: {longest} tokens do not fit the model's "
                      f"context of {limit} with room for one more")
    if max_new < 1:
      raise UserError(f"--max_new_tokens={max_new}: must be above 0")

  def _prefill(self, cache, prompts, key, sampler):
    """Feeds the prompts, a chunk at a time.

    Rows that have ended are fed padding: its keys lie beyond the row's end,
    where the tokens drawn are written later.

    Returns:
      The first token drawn, and what `_step` carries, statistics all 0.
    """
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    longest = int(lengths_B.max())
    width = _bucket(longest, min(self._chunk, self.config.context_length))
    tokens_BxL = np.zeros((len(prompts), -(-longest // width) * width),
                          np.int32)
    for row, prompt in zip(tokens_BxL, prompts):
      row[:len(prompt)] = prompt
    next_B = None
    for start in range(0, longest, width):
      last_B = lengths_B - 1 - start
      drawn_B, (cache, statistics) = self._feed(
          self._params, (cache, None), tokens_BxL[:, start:start + width],
          np.full_like(lengths_B, start), np.clip(last_B, 0, width - 1), key,
          np.int32(0), sampler)
      # A row's token is drawn after the chunk that holds its prompt's end.
      next_B = drawn_B if next_B is None else jnp.where(last_B >= 0, drawn_B,
                                                        next_B)
    return next_B, (cache, jax.tree.map(jnp.zeros_like, statistics))

  def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               sampler: Sampler, key: jax.Array,
               stop_id: int | None = None) -> Iterator[np.ndarray]:
    """Yields the next token of every row, (B,), until all rows stopped.

    Rows may differ in length. A row that has drawn `stop_id` goes on yielding
    it. The context's end ends the generation too. At the end
    `self.statistics` holds the sparsity of the tokens decoded one by one after
    the prompt; a row that has stopped counts until all have, and then to the
    end of what has been started.

    Args:
      prompts: a row each, as tokens.
      max_new_tokens: the most to draw for each.
      sampler: how to draw.
      key: of all draws.
      stop_id: the token that ends a row; None: none does.

    Raises:
      UserError: on an empty prompt, one that the context cannot hold, no token
        to draw, or a kernel that cannot serve so many rows.
    """
    self._check(prompts, max_new_tokens)
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    limit = self.config.context_length
    steps = min(max_new_tokens, limit - int(lengths_B.max()))
    slots = _bucket(int(lengths_B.max()) + steps, limit)
    slots = -(-slots // _SLOTS) * _SLOTS
    attention = choose_attention(self.config.attention, len(prompts), slots,
                                 self._dtype, self._skip_keys)
    self.attention_implementations = [attention] * self.config.num_layers
    self.ffn_implementations = self._choose_ffns(len(prompts))
    cache = decoding_cache(self.config, len(prompts), slots, self._dtype,
                           attention)
    self.statistics = None
    token_B, carry = self._prefill(cache, prompts, key, sampler)
    newest_TxB = token_B[None]
    stopped_B = np.zeros(len(prompts), bool)
    done = 0
    while done < steps:
      ready_TxB = newest_TxB
      first = done + len(ready_TxB)
      if first < steps:  # Runs while the caller handles what is ready.
        token_B, carry, newest_TxB = self._advance(
            self._params, carry, token_B, lengths_B + first - 1, key,
            np.int32(first), np.int32(steps - first), sampler)
      for drawn_B in np.asarray(ready_TxB)[:steps - done]:
        if stop_id is not None:
          drawn_B = np.where(stopped_B, stop_id, drawn_B)
          stopped_B |= drawn_B == stop_id
        yield drawn_B
        if stopped_B.all():
          break
      done = steps if stopped_B.all() else first
    self.statistics = carry[1]

  def sparsity(self) -> dict[str, float]:
    """Of the newest `generate`: means over the tokens decoded one by one.

    Empty where there are none: before its end, without `measure`, and where
    one token a row was drawn, since the prompt alone was fed then.
    """
    stats = jax.device_get(self.statistics)
    if stats is None or not stats.tokens:
      return {}
    active = stats.sums["active_neurons"] / self.config.ffn.num_neurons
    return {
        "active_fraction": float(active.mean() / stats.tokens),
        "attended_keys": float(stats.sums["attended_keys"].mean()
                               / stats.tokens),
    }
