"""Prepares a dataset once, in the cache, and reads its documents."""

from collections.abc import Iterator
import contextlib
import difflib
import fcntl
import hashlib
import importlib
import io
import os
import pathlib
import sys

import tensorflow_datasets as tfds

from sparse_lm.config import DataConfig
from sparse_lm.data import documents, python_source, text_folder
from sparse_lm.data import tokenizer as tokenizer_lib
from sparse_lm.errors import UserError

Builder = tfds.core.DatasetBuilder
_FORMAT = "array_record"  # the one that needs no TensorFlow


class Documents:
  """The texts of a split, by index, as Grain wants them."""

  def __init__(self, data_dir: str, split: str, text_key: str):
    self._arguments = data_dir, split, text_key
    builder = tfds.builder_from_directory(data_dir)
    self._examples = builder.as_data_source(split)
    self._text_key = text_key

  def __reduce__(self):
    return Documents, self._arguments

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> str:
    text = self._examples[index][self._text_key]
    return text.decode() if isinstance(text, bytes) else text


def prepare(data: DataConfig) -> Builder:
  """The builder of `data.dataset`, its data in the cache."""
  with _locked(data) as cache:
    builder = _make_builder(data, cache)
    if not builder.data_path.exists():  # TFDS renames it into place
      if isinstance(builder, documents.DocumentBuilder):
        _prepare_quietly(builder, data)
      else:
        _download(builder, data)
  return builder


def open_documents(builder: Builder, data: DataConfig,
                   split_key: str) -> Documents:
  """The documents of the split that `config.data.<split_key>` names."""
  split = getattr(data, split_key)
  text_key = "text" if data.dataset == "text_folder" else data.text_key
  _check_text_key(builder, text_key)
  known = ", ".join(f"{name} ({info.num_examples:,} documents)"
                    for name, info in builder.info.splits.items())
  try:
    found = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as error:
    raise UserError(f"config.data.{split_key}: no split {split!r} in "
                    f"{data.dataset}; it has {known}") from error
  if not found:
    raise UserError(f"config.data.{split_key}: {split!r} holds no document; "
                    f"{data.dataset} has {known}")
  try:
    return Documents(os.fspath(builder.data_dir), split, text_key)
  except NotImplementedError as error:
    raise UserError(f"config.data.dataset: {builder.data_dir} is not in the "
                    f"{_FORMAT} format; set another cache_dir") from error


def open_tokenizer(builder: Builder, data: DataConfig,
                   vocab_size: int) -> tokenizer_lib.Tokenizer:
  """The tokenizer of `data`; BPE is trained on the train split, once."""
  if data.tokenizer == "bytes":
    return tokenizer_lib.byte_tokenizer()
  if data.tokenizer != "bpe":
    return tokenizer_lib.load(data.tokenizer)
  if vocab_size < tokenizer_lib.MIN_BPE_SIZE:
    raise UserError(f"config.model.vocab_size: {vocab_size} is too small for "
                    f"bpe, which needs {tokenizer_lib.MIN_BPE_SIZE}")
  source = hashlib.sha256(f"{data.train_split}|{data.text_key}".encode())
  file = pathlib.Path(
      builder.data_dir, f"bpe-{vocab_size}-{source.hexdigest()[:8]}.json")
  with _locked(data):
    if not file.exists():
      texts = open_documents(builder, data, "train_split")
      trained = tokenizer_lib.train_bpe(
          (texts[i] for i in range(len(texts))), vocab_size)
      trained.save(file)
      _notify(
          f"{data.dataset}: bpe tokenizer of {trained.vocab_size:,} tokens")
  return tokenizer_lib.load(file)


def fingerprint(builder: Builder) -> str:
  """Tells one content of a dataset from another."""
  if isinstance(builder, documents.DocumentBuilder):
    return builder.info.metadata["fingerprint"]
  sizes = [(name, split.num_examples, split.num_bytes)
           for name, split in sorted(builder.info.splits.items())]
  return repr((builder.info.full_name, sizes))


@contextlib.contextmanager
def _locked(data: DataConfig) -> Iterator[pathlib.Path]:
  """Holds a dataset, so that of two processes one prepares and one waits.

  Yields:
    The cache folder.
  """
  cache = pathlib.Path(data.cache_dir).expanduser()
  name = data.dataset.replace("/", "-")
  try:
    cache.mkdir(parents=True, exist_ok=True)
    lock = (cache / f".{name}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
  except OSError as error:
    raise UserError(
        f"config.data.cache_dir: cannot write to {cache}: {error}") from error
  with lock:  # closing the file releases the lock
    yield cache


def _make_builder(data: DataConfig, cache: pathlib.Path) -> Builder:
  if data.dataset == text_folder.TextFolder.name:
    key = text_folder.TextFolder.cache_key(data.path, data.text_key)
    return text_folder.TextFolder(
        path=data.path, text_key=data.text_key, data_dir=cache / key,
        file_format=_FORMAT)
  name, _, variant = data.dataset.partition("/")
  if name == python_source.PythonSource.name:
    variants = list(python_source.PythonSource.builder_configs)
    if variant not in variants:
      raise UserError(f"config.data.dataset: {data.dataset!r} is not one of "
                      + ", ".join(f"{name}/{known}" for known in variants))
    key = python_source.PythonSource.cache_key(variant)
    return python_source.PythonSource(
        config=variant, data_dir=cache / key, file_format=_FORMAT)
  return _named_builder(data.dataset, cache)


def _named_builder(name: str, cache: pathlib.Path) -> Builder:
  # Without TensorFlow, TFDS gives up importing its datasets before the texts.
  importlib.import_module("tensorflow_datasets.text")
  try:
    return tfds.builder(name, data_dir=cache, file_format=_FORMAT)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False) + ["text_folder"]
    near = difflib.get_close_matches(name.partition("/")[0], known)
    raise UserError(f"config.data.dataset: TFDS knows no {name!r}; nearest: "
                    f"{', '.join(near) or 'none'}") from error
  except Exception as error:  # datasets raise all kinds
    raise UserError(f"config.data.dataset: {_one_line(error)}") from error


def _prepare_quietly(builder: documents.DocumentBuilder,
                     data: DataConfig) -> None:
  """One line of our own in place of the bars and notes of TFDS."""
  tfds.display_progress_bar(False)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  except OSError as error:
    raise UserError(f"config.data.cache_dir: cannot write to "
                    f"{data.cache_dir}: {error}") from error
  finally:
    tfds.display_progress_bar(True)
  _notify(f"{data.dataset}: {builder.summary()}")


def _download(builder: Builder, data: DataConfig) -> None:
  """TFDS reports its own progress: a download may take hours."""
  try:
    builder.download_and_prepare()
  except Exception as error:
    raise UserError(f"config.data.dataset: cannot prepare {data.dataset}: "
                    f"{_one_line(error)}") from error


def _check_text_key(builder: Builder, text_key: str) -> None:
  texts = [name for name, feature in builder.info.features.items()
           if isinstance(feature, tfds.features.Text)]
  if text_key not in texts:
    raise UserError(f"config.data.text_key: {text_key!r} is not a text of "
                    f"{builder.name}; it has {', '.join(texts) or 'none'}")


def _notify(line: str) -> None:
  """To stderr: stdout is for a command's results, which may be JSON."""
  print(line, file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__
