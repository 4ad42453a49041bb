"""Text in, text out."""

from collections.abc import Iterator

import jax

from sparse_lm.decoding.decoder import Decoder
from sparse_lm.decoding.samplers import Sampler


def stream_text(decoder: Decoder, tokenizer, prompt: str, max_new_tokens: int,
                sampler: Sampler, seed: int = 0) -> Iterator[str]:
  """Yields pieces of a completion; joined, they are the completion.

  Args:
    decoder: the model.
    tokenizer: a `sparse_lm.data.tokenizer.Tokenizer`, the model's.
    prompt: goes on as a document that begins with it; may be empty.
    max_new_tokens: the most to draw. The document's end ends it too.
    sampler: how to draw.
    seed: of the draws.
  """
  boundary = tokenizer.boundary_id
  stream = tokenizer.stream()
  for drawn_B in decoder.generate(
      [[boundary, *tokenizer.encode(prompt)]], max_new_tokens, sampler,
      jax.random.key(seed), stop_id=boundary):
    if drawn_B[0] != boundary:
      yield stream.feed(int(drawn_B[0]))
  yield stream.flush()
