"""Tokenizers: bytes, byte-level BPE, or any tokenizer.json.

All three are one `tokenizers.Tokenizer` behind one class.
"""

from collections.abc import Iterable, Iterator, Sequence
import json
import os
import pathlib
import re

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sparse_lm.errors import UserError

BOUNDARY = "<|endoftext|>"
MIN_BPE_SIZE = 257  # the bytes and the boundary
# Where a foreign tokenizer may keep its boundary, the likeliest first.
_BOUNDARIES = (BOUNDARY, "<|begin_of_text|>", "<bos>", "<s>", "[BOS]",
               "<|end_of_text|>", "<eos>", "</s>", "[EOS]")
_SAMPLE_BYTES = 50_000_000  # text that BPE learns from
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
  """Text to ids and back.

  Attributes:
    vocab_size: one above the largest id.
    boundary_id: the id that stands before and after every document.
    token_bytes_V: UTF-8 bytes that each id stands for, 0 for special ones.
  """

  def __init__(self, inner: tokenizers.Tokenizer):
    inner.encode_special_tokens = True  # text that spells one is text
    inner.no_truncation()
    inner.no_padding()
    self._inner = inner
    vocab = inner.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    found = [vocab[name] for name in _BOUNDARIES if name in vocab]
    if not found:
      raise UserError("config.data.tokenizer: it has none of the boundary "
                      f"tokens {', '.join(_BOUNDARIES)}")
    self.boundary_id = found[0]
    self.token_bytes_V = _token_bytes(inner, vocab, self.vocab_size)

  def __reduce__(self):
    return Tokenizer.from_json, (self.to_json(),)

  def encode(self, text: str) -> np.ndarray:
    return np.array(
        self._inner.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; special tokens have none."""
    return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

  def stream(self) -> "Stream":
    return Stream(self)

  def to_json(self) -> str:
    return self._inner.to_str()

  @classmethod
  def from_json(cls, text: str) -> "Tokenizer":
    return cls(tokenizers.Tokenizer.from_str(text))

  def save(self, path: str | os.PathLike) -> None:
    """Writes a tokenizer.json, whole or not at all."""
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(self.to_json(), encoding="utf-8")
    os.replace(partial, path)


class Stream:
  """Decodes ids one at a time, for printing while they are generated."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._ids = []  # those of the last piece, as context, and those held back
    self._shown = 0  # how many of them are in the last piece

  def feed(self, token_id: int) -> str:
    """The text that is certain now: "" inside a multi-byte character."""
    self._ids.append(token_id)
    piece = self._pending()
    # The replacement character is how an incomplete character decodes.
    if not piece or piece.endswith("\ufffd"):
      return ""
    self._ids = self._ids[self._shown:]
    self._shown = len(self._ids)
    return piece

  def flush(self) -> str:
    """What is still held back, when no id will follow."""
    piece = self._pending()
    self._ids, self._shown = [], 0
    return piece

  def _pending(self) -> str:
    decode = self._tokenizer.decode
    return decode(self._ids)[len(decode(self._ids[:self._shown])):]


def _token_bytes(inner: tokenizers.Tokenizer, vocab: dict[str, int],
                 size: int) -> np.ndarray:
  """Exact for byte-level and SentencePiece vocabularies, near for others."""
  decoder = json.loads(inner.to_str())["decoder"]
  byte_level = '"ByteLevel"' in json.dumps(decoder)
  added = inner.get_added_tokens_decoder()
  counts = np.zeros(size, np.int32)
  for token, i in vocab.items():
    if i in added:
      counts[i] = 0 if added[i].special else len(token.encode())
    elif byte_level:
      counts[i] = len(token)  # one character stands for one byte
    elif _BYTE_TOKEN.fullmatch(token):
      counts[i] = 1
    else:
      counts[i] = len(token.replace("\u2581", " ").encode())
  return counts


def _byte_characters() -> list[str]:
  """The character that byte-level tokenizers write for each of the 256 bytes.

  A byte that is a printable Latin-1 character stands for itself; the others
  take, in order, the characters from U+0100 on.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  others = iter(char for char in alphabet if ord(char) > 255)
  return [chr(b) if chr(b) in alphabet else next(others) for b in range(256)]


def byte_tokenizer() -> Tokenizer:
  """Ids 0 to 255 are the bytes; 256 is the boundary."""
  vocab = {char: i for i, char in enumerate(_byte_characters())}
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False)
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens([BOUNDARY])
  return Tokenizer(inner)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Byte-level BPE, learnt from the first 50 MB of `texts`."""
  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[BOUNDARY], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  inner.train_from_iterator(_sample(texts), trainer)
  return Tokenizer(inner)


def _sample(texts: Iterable[str]) -> Iterator[str]:
  left = _SAMPLE_BYTES
  for text in texts:
    yield text[:left]
    left -= len(text.encode())
    if left <= 0:
      return


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer.json."""
  try:
    text = pathlib.Path(path).expanduser().read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
        f"config.data.tokenizer: cannot read {path}: {error}") from error
  try:
    inner = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library raises bare Exceptions
    raise UserError(f"config.data.tokenizer: {path} is not a tokenizer.json: "
                    f"{error}") from error
  return Tokenizer(inner)
