"""Tokenizers lose nothing, count bytes exactly and decode in pieces."""

import pickle

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from sparse_lm.data import tokenizer as lib
from sparse_lm.errors import UserError

_SAMPLE = [f"def f{i}(x):\n    return x + {i}  # naïve 😀\n"
           for i in range(200)]
_BYTES = lib.byte_tokenizer()
_BPE = lib.train_bpe(_SAMPLE, 400)

both = pytest.mark.parametrize(
    "tokenizer", [_BYTES, _BPE], ids=["bytes", "bpe"])
# Whatever has a UTF-8 form: surrogates do not.
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["<|endoftext|>", " <|endoftext|>x", "👩‍👩‍👧 é\u0301\r\n\t\x00",
     "\ufffd", *_SAMPLE])


@both
@given(text=any_text)
@settings(max_examples=60, deadline=None)
def test_encoding_is_lossless_and_counts_bytes(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
  assert tokenizer.boundary_id not in ids


@both
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_stream_joins_to_the_whole(tokenizer, data):
  ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
  stream = tokenizer.stream()
  pieces = [stream.feed(i) for i in ids]
  assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_back_half_a_character():
  stream = _BYTES.stream()
  pieces = [stream.feed(i) for i in "a😀b".encode()]
  assert pieces == ["a", "", "", "", "😀", "b"]


def test_byte_ids_are_bytes():
  assert _BYTES.vocab_size == 257
  assert _BYTES.encode("é~").tolist() == list("é~".encode())
  for byte in range(128):
    assert _BYTES.decode([byte]) == chr(byte)


def test_bpe_is_deterministic_and_shortens():
  again = lib.train_bpe(iter(_SAMPLE), 400)
  assert again.to_json() == _BPE.to_json()
  assert _BPE.vocab_size == lib.train_bpe(_SAMPLE, 300).vocab_size + 100
  assert len(_BPE.encode(_SAMPLE[0])) < len(_SAMPLE[0].encode()) / 2


def test_bpe_reads_a_bounded_sample(monkeypatch):
  monkeypatch.setattr(lib, "_SAMPLE_BYTES", 100)
  texts = iter(["ab" * 40, "cd" * 40, "never read"])
  lib.train_bpe(texts, 260)
  assert list(texts) == ["never read"]


@both
def test_save_load_and_pickle(tokenizer, tmp_path):
  file = tmp_path / "tokenizer.json"
  tokenizer.save(file)
  assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
  for copy in (lib.load(file), pickle.loads(pickle.dumps(tokenizer))):
    assert copy.to_json() == tokenizer.to_json()
    assert copy.boundary_id == tokenizer.boundary_id
    text = "<|endoftext|>é"
    assert (copy.encode(text) == tokenizer.encode(text)).all()


def _sentencepiece_like(specials=("<bos>",)):
  """The parts of Gemma's tokenizer.json: spaces as U+2581, byte fallback."""
  tokens = [*specials, "\u2581", *"helo", *(f"<0x{b:02X}>" for b in range(256))]
  inner = tokenizers.Tokenizer(models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=[],
      byte_fallback=True))
  inner.normalizer = normalizers.Replace(" ", "\u2581")
  inner.decoder = decoders.Sequence([
      decoders.Replace("\u2581", " "), decoders.ByteFallback(),
      decoders.Fuse()])
  inner.add_special_tokens(list(specials))
  inner.enable_truncation(4)
  return inner


def test_foreign_tokenizer(tmp_path):
  _sentencepiece_like().save(str(tmp_path / "t.json"))
  tokenizer = lib.load(tmp_path / "t.json")
  assert tokenizer.boundary_id == 0
  text = "hello 😀 hole"  # longer than the truncation in the file
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
  stream = tokenizer.stream()
  assert "".join(map(stream.feed, ids)) + stream.flush() == text


def test_bad_files(tmp_path):
  with pytest.raises(UserError, match="config.data.tokenizer: cannot read"):
    lib.load(tmp_path / "absent.json")
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(UserError, match="is not a tokenizer.json"):
    lib.load(tmp_path / "bad.json")
  _sentencepiece_like(specials=()).save(str(tmp_path / "none.json"))
  with pytest.raises(UserError, match="none of the boundary tokens"):
    lib.load(tmp_path / "none.json")
