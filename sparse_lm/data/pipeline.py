"""Batches of packed sequences, by Grain.

    documents -> shuffle -> tokenize -> pack -> shuffle rows -> batch

A batch is a dict of `tokens_BxL`, `targets_BxL`, `weights_BxL` (0: padding),
`segment_ids_BxL` (which document of the row, from 1; 0: padding) and
`positions_BxL` (within the segment). B is the process's share of the batch.
"""

import dataclasses
import functools
import hashlib

from absl import flags
import grain

from sparse_lm.config import Config
from sparse_lm.data import packing, prepare
from sparse_lm.data.tokenizer import Tokenizer
from sparse_lm.errors import UserError

_BATCHES_AHEAD = 4
_VOCAB_MULTIPLE = 256  # a model may pad its vocabulary so far


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A prepared dataset and its tokenizer.

  Attributes:
    fingerprint: changes when the documents or the tokenizer do.
  """

  config: Config
  tokenizer: Tokenizer
  fingerprint: str
  _builder: prepare.Builder

  def train(self, process_index: int = 0,
            process_count: int = 1) -> grain.IterDataset:
    """Batches without end, of this process's share of the documents.

    Every epoch has an order of its own. `config.training.batch_size` is
    divided among the processes.
    """
    data, training = self.config.data, self.config.training
    documents = self._documents("train_split")
    if len(documents) < process_count:
      raise UserError(f"config.data.train_split: {len(documents)} documents "
                      f"are too few for {process_count} processes")
    documents = (documents[process_index::process_count]
                 .shuffle(training.seed).repeat())
    workers = max(1, data.num_workers)  # each has a window
    rows = grain.experimental.WindowShuffleIterDataset(
        self._pack(documents), seed=training.seed,
        window_size=max(1, data.shuffle_window // workers))
    batches = rows.batch(self._local_batch_size(process_count))
    return _prefetch(batches.map(packing.to_batch), data.num_workers)

  def evaluation(self, split: str | None = None, process_index: int = 0,
                 process_count: int = 1,
                 batches: int | None = None) -> grain.IterDataset:
    """The first `batches` batches of a split in order, or all of them.

    Every process packs all documents and takes its rows of each batch, so
    that the batches are the same whatever the number of processes. The last
    batch is padded with rows of weight 0.

    Args:
      split: in place of `config.data.eval_split`.
    """
    size = self.config.training.batch_size
    local = self._local_batch_size(process_count)
    rows = self._pack(self._documents("eval_split", split))
    whole = rows.batch(size, drop_remainder=False, batch_fn=functools.partial(
        grain.experimental.batch_and_pad, batch_size=size))
    if batches is not None:
      whole = grain.experimental.LimitIterDataset(whole, batches)
    share = slice(process_index * local, (process_index + 1) * local)
    to_share = functools.partial(packing.to_batch, rows=share)
    return _prefetch(whole.map(to_share), num_workers=0)

  def _documents(self, split_key: str,
                 split: str | None = None) -> grain.MapDataset:
    data = self.config.data
    if split is not None:
      data = dataclasses.replace(data, **{split_key: split})
    return grain.MapDataset.source(
        prepare.open_documents(self._builder, data, split_key))

  def _pack(self, documents: grain.MapDataset) -> grain.IterDataset:
    return packing.pack(
        documents, self.tokenizer, self.config.model.context_length)

  def _local_batch_size(self, process_count: int) -> int:
    size = self.config.training.batch_size
    if size % process_count:
      raise UserError(f"config.training.batch_size: {size} is not divisible "
                      f"by the {process_count} processes")
    return size // process_count

  def _check_context_length(self) -> None:
    """Stops where the train split has filled a row, usually at once."""
    length, supplied = self.config.model.context_length, 0
    documents = self._documents("train_split")
    for text in documents:
      supplied += len(self.tokenizer.encode(text)) + 1
      if supplied >= length:
        return
    raise UserError(f"config.model.context_length: {length} is longer than "
                    f"the data supplies: {supplied} tokens in "
                    f"{len(documents)} documents")


def open_corpus(config: Config) -> Corpus:
  """Prepares the dataset and the tokenizer, or reuses those of the cache."""
  builder = prepare.prepare(config.data)
  for split_key in ("train_split", "eval_split"):
    prepare.open_documents(builder, config.data, split_key)
  tokenizer = prepare.open_tokenizer(
      builder, config.data, config.model.vocab_size)
  _check_vocab_size(config, tokenizer)
  identity = prepare.fingerprint(builder) + tokenizer.to_json()
  corpus = Corpus(config, tokenizer,
                  hashlib.sha256(identity.encode()).hexdigest()[:16], builder)
  corpus._check_context_length()
  return corpus


def _prefetch(batches: grain.IterDataset,
              num_workers: int) -> grain.IterDataset:
  if not num_workers:
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=_BATCHES_AHEAD)
  # Grain reads absl flags, which only `app.run` parses.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return batches.mp_prefetch(grain.MultiprocessingOptions(
      num_workers=num_workers, per_worker_buffer_size=_BATCHES_AHEAD))


def _check_vocab_size(config: Config, tokenizer: Tokenizer) -> None:
  size, tokens = config.model.vocab_size, tokenizer.vocab_size
  most = -(-tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
  if not tokens <= size <= most:
    raise UserError(
        f"config.model.vocab_size: {size}, but the tokenizer "
        f"{config.data.tokenizer!r} has {tokens} tokens: set {tokens} to "
        f"{most}")
