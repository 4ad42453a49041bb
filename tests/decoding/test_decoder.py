"""Decoding against teacher forcing, samplers against their definitions."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorder import Recorder
import scipy.special

from sparse_lm.config import (AttentionConfig, FFNConfig, LinearInputsConfig,
                              ModelConfig)
from sparse_lm.decoding import (Decoder, Greedy, attention,
                                decoder as decoder_lib, make_sampler)
from sparse_lm.errors import UserError
from sparse_lm.model import Transformer

CONFIG = ModelConfig(
    vocab_size=50, context_length=48, num_layers=2, model_dim=32,
    ffn=FFNConfig(num_neurons=64, predictor_dim=16, active_fraction=0.2),
    attention=AttentionConfig(num_query_heads=4, num_kv_heads=2, head_dim=8,
                              predictor_dim=4, top_k=6, sliding_window=9))
DENSE = dataclasses.replace(
    CONFIG, ffn=FFNConfig(shape="gated", num_neurons=64, sparsifier="none"),
    attention=dataclasses.replace(CONFIG.attention, shape="dense"))
# Top-k of each token's own inputs and neurons, in the second layer alone. Of
# two queries a key the mixed values may tie, where a token repeats itself.
Q_SPARSE = dataclasses.replace(
    CONFIG, ffn=FFNConfig(shape="gated", num_neurons=64, sparsifier="topk",
                          active_fraction=0.25, sparse_layers="1",
                          activation="fatrelu", threshold=0.05,
                          up_activation="relu"),
    attention=dataclasses.replace(DENSE.attention, num_query_heads=2),
    linear_inputs=LinearInputsConfig(sparsifier="topk"))
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(10, 31))]  # ragged


def make(config, **options):
  model = Transformer(config, nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model))
  graph = nnx.graphdef(model)
  forward = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))
  return Decoder(config, params, **options), forward


def run(decoder, prompts, steps, sampler=Greedy(), **keys):
  drawn = decoder.generate(prompts, steps, sampler, jax.random.key(0), **keys)
  return np.array(list(drawn))


def check_teacher_forcing(decoder, forward, steps=20):
  """Logits are the whole sequence's forward pass's, ragged rows too."""
  recorder = Recorder()
  drawn_TxB = run(decoder, PROMPTS, steps, recorder)
  logits_TxBxV = recorder.logits_TxBxV[:steps]
  for row, prompt in enumerate(PROMPTS):
    sequence = [*prompt, *drawn_TxB[:, row]]
    padded = np.zeros((1, decoder.config.context_length), np.int32)
    padded[0, :len(sequence)] = sequence
    expected = forward(padded)[0][0, len(prompt) - 1:len(sequence) - 1]
    np.testing.assert_allclose(logits_TxBxV[:, row], expected, atol=2e-5)
  assert len(np.unique(drawn_TxB)) > steps // 2


@pytest.mark.parametrize("config", [CONFIG, DENSE, Q_SPARSE],
                         ids=["spark", "dense", "q_sparse"])
def test_decoding_is_teacher_forcing(config):
  check_teacher_forcing(*make(config))


def test_decoding_by_a_kernel_is_teacher_forcing(monkeypatch):
  monkeypatch.setattr(attention, "choose", lambda *_: "xla")
  decoder, forward = make(CONFIG)
  check_teacher_forcing(decoder, forward)
  assert decoder.attention_implementations == ["xla"] * 2


def test_tokens_drawn_in_one_call_are_those_drawn_one_by_one(monkeypatch):
  """As on accelerators, eight a call; the last call's are not all wanted."""
  one_by_one = run(make(CONFIG)[0], PROMPTS, 19)
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: "gpu")
    decoder, forward = make(CONFIG)
  np.testing.assert_array_equal(run(decoder, PROMPTS, 19), one_by_one)
  check_teacher_forcing(decoder, forward, 17)


def test_the_cache_stays_in_place(monkeypatch):
  """What a step is given it takes: there is one cache, not two."""
  caches = []

  def note(function):
    def noted(*arguments):
      result = function(*arguments)
      caches.append(jax.tree.leaves(result))
      return result

    return noted

  decoder, _ = make(CONFIG)
  monkeypatch.setattr(decoder_lib, "decoding_cache",
                      note(decoder_lib.decoding_cache))
  for name in ("_feed", "_advance"):
    monkeypatch.setattr(decoder, name, note(getattr(decoder, name)))
  run(decoder, PROMPTS, 4)
  assert len(caches) == 1 + 1 + 3
  large = [[x for x in leaves if x.ndim > 2] for leaves in caches]
  for arrays in large[:-1]:
    assert len(arrays) == 4 and all(x.is_deleted() for x in arrays)
  assert len(large[-1]) == 4 and not any(x.is_deleted() for x in large[-1])


@pytest.fixture(scope="module", name="whole")
def whole_prompts():
  """What is drawn after prompts that are fed whole, greedily or not."""
  decoder, _ = make(CONFIG)
  return {sampler: run(decoder, PROMPTS, 12, sampler)
          for sampler in (Greedy(), make_sampler(1.0))}


# Of the prompts of 1, 5 and 21 tokens, the chunks' boundaries cut one or two,
# or touch an end; 20 leaves a last chunk that is mostly padding.
@pytest.mark.parametrize("chunk, kernel", [(3, None), (5, "xla"), (20, None)])
def test_a_prompt_in_chunks_is_the_prompt(monkeypatch, whole, chunk, kernel):
  monkeypatch.setattr(attention, "choose", lambda *_: kernel)
  decoder, _ = make(CONFIG, prefill_chunk=chunk)
  for sampler, drawn in whole.items():
    np.testing.assert_array_equal(run(decoder, PROMPTS, 12, sampler), drawn)


def test_a_prompt_may_fill_the_context_but_for_one_token():
  """The last chunk's padding would stand beyond the cache's end."""
  prompts = [[1] * 46, list(range(47)), [7]]
  decoder, forward = make(CONFIG, prefill_chunk=10)
  drawn, = run(decoder, prompts, 5)
  for token, prompt in zip(drawn, prompts):
    padded = np.zeros((1, 48), np.int32)
    padded[0, :len(prompt)] = prompt
    logits = np.asarray(forward(padded)[0][0, len(prompt) - 1])
    assert logits.max() - logits[token] < 1e-4


def test_logits_with_a_cache_equal_those_without():
  """Token by token through the cache, against one forward pass."""
  from sparse_lm.model.cache import empty_cache  # pylint: disable=g-import-not-at-top
  model = Transformer(CONFIG, nnx.Rngs(0))
  graph, params = nnx.split(model)
  tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 50)

  @jax.jit
  def advance(params, cache, tokens, start):
    model = nnx.merge(graph, params)
    positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]),
                                         tokens.shape)
    x, statistics, cache = model.hidden(tokens, positions, cache=cache)
    return model.unembed(x), statistics, cache

  whole, statistics = jax.jit(
      lambda params: nnx.merge(graph, params)(tokens))(params)
  cache = empty_cache(CONFIG, 2, 32, jnp.float32)
  pieces, sums = [], []
  for start, stop in [(0, 10), (10, 11), (11, 12), (12, 20), (20, 24)]:
    logits, part, cache = advance(params, cache, tokens[:, start:stop], start)
    pieces.append(logits)
    sums.append(part)
  np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=2e-5)
  total = jax.tree.map(lambda *x: sum(x), *sums)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
               total, statistics)


def test_a_row_alone_is_a_row_in_a_batch():
  decoder, _ = make(CONFIG)
  together = run(decoder, PROMPTS, 12)
  for row, prompt in enumerate(PROMPTS):
    np.testing.assert_array_equal(run(decoder, [prompt], 12)[:, 0],
                                  together[:, row])


def test_generation_ends():
  decoder, _ = make(CONFIG)
  assert len(run(decoder, [[1] * 40], 100)) == 8  # at the context's end
  free = run(decoder, PROMPTS, 12)
  stop = int(free[3, 0])
  stopped = run(decoder, PROMPTS[:1], 12, stop_id=stop)
  first = list(free[:, 0]).index(stop)
  np.testing.assert_array_equal(stopped[:, 0], free[:first + 1, 0])


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_what_is_counted_is_what_was_asked_for(monkeypatch, count, steps):
  """But for the first token, which is drawn when the prompt is fed."""
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: "cpu" if count == 1 else "gpu")
    decoder, _ = make(CONFIG)
  run(decoder, PROMPTS, steps)
  assert decoder.statistics.tokens == 3 * (steps - 1)
  sparsity = decoder.sparsity()
  assert not sparsity if steps == 1 else 0 < sparsity["active_fraction"] < 1


def test_sparsity_of_what_was_decoded():
  decoder, _ = make(CONFIG)
  run(decoder, PROMPTS, 20)
  sparsity = decoder.sparsity()
  assert 0.1 < sparsity["active_fraction"] < 0.3
  assert 1 <= sparsity["attended_keys"] < 9
  dense, _ = make(DENSE)
  run(dense, PROMPTS, 20)
  assert dense.sparsity()["active_fraction"] > 0.99


@pytest.mark.parametrize("prompts, steps, message", [
    ([[1] * 48], 5, "48 tokens do not fit the model's context of 48"),
    ([[]], 5, "at least one token"),
    ([[1]], 0, "--max_new_tokens=0"),
])
def test_bad_requests(prompts, steps, message):
  decoder, _ = make(CONFIG)
  with pytest.raises(UserError, match=message):
    run(decoder, prompts, steps)


LOGITS = jnp.log(jnp.array([[0.5, 0.05, 0.3, 0.15]]))


@pytest.mark.parametrize("keys, allowed", [
    ({}, [0, 1, 2, 3]), ({"top_k": 2}, [0, 2]), ({"top_k": 9}, [0, 1, 2, 3]),
    ({"top_p": 0.79}, [0, 2]), ({"top_p": 0.81}, [0, 2, 3]),
    ({"top_p": 0.01}, [0]), ({"top_k": 2, "top_p": 0.6}, [0]),
])
def test_samplers_cut(keys, allowed):
  """top_p of 0.6 after top_k of 2: 0.5 / 0.8 reaches it alone."""
  sampler = make_sampler(1.0, **keys)
  logits = np.asarray(sampler.allowed(LOGITS))[0]
  assert list(np.flatnonzero(logits > -np.inf)) == allowed


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_by_frequency(temperature):
  sampler = make_sampler(temperature)
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = jax.jit(jax.vmap(lambda key: sampler(LOGITS, key)[0]))(keys)
  expected = scipy.special.softmax(np.asarray(LOGITS[0]) / temperature)
  np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000,
                             expected, atol=0.015)


def test_greedy():
  assert make_sampler(0.0)(LOGITS, jax.random.key(0))[0] == 0


@pytest.mark.parametrize("values, message", [
    ((-1.0,), "--temperature"), ((float("nan"),), "--temperature=nan: must be"),
    ((float("inf"),), "--temperature"), ((1e-40,), "must be 0, or a number of"),
    ((1.0, -1), "--top_k"),
    ((1.0, 0, 0.0), "--top_p"), ((1.0, 0, 1.5), "--top_p"),
])
def test_bad_sampling_values(values, message):
  with pytest.raises(UserError, match=message):
    make_sampler(*values)
