"""Documents to rows of one length, by Grain's packer.

A document is a boundary, its ids and a boundary, so that a model can be
started from a boundary and learns to stop. It enters the packer as (token,
target) pairs: every id is predicted exactly once, by what precedes it in its
own document, wherever the packer cuts.
"""

import functools

import grain
import numpy as np

from sparse_lm.data.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]

# Tokenizing runs ahead by so many documents, which may be whole books.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


def pack(documents: grain.MapDataset, tokenizer: Tokenizer,
         length: int) -> grain.IterDataset:
  """Rows of `length` pairs; only the very last one may hold padding."""
  pairs = documents.map(functools.partial(_pairs, tokenizer=tokenizer))
  return _Restorable(grain.experimental.ConcatThenSplitIterDataset(
      pairs.to_iter_dataset(_READ), length_struct={"pairs": length}))


def to_batch(packed: Arrays, rows: slice = slice(None)) -> Arrays:
  """What a training step reads, from `rows` of a batch of packed rows."""
  pairs_BxLx2 = packed["pairs"][rows]
  segment_ids_BxL = packed["pairs_segment_ids"][rows]
  return {
      "tokens_BxL": np.ascontiguousarray(pairs_BxLx2[..., 0]),
      "targets_BxL": np.ascontiguousarray(pairs_BxLx2[..., 1]),
      "weights_BxL": (segment_ids_BxL > 0).astype(np.float32),
      "segment_ids_BxL": segment_ids_BxL,  # 0: padding
      "positions_BxL": packed["pairs_positions"][rows],
  }


def _pairs(text: str, tokenizer: Tokenizer) -> Arrays:
  boundary = [tokenizer.boundary_id]
  ids = np.concatenate([boundary, tokenizer.encode(text), boundary])
  return {"pairs": np.stack([ids[:-1], ids[1:]], axis=1).astype(np.int32)}


class _Restorable(grain.IterDataset):
  """Mends the packer's state after a checkpoint.

  The packer compares its slices with a tuple. A checkpoint is JSON, which
  makes lists of tuples, so that a restored packer would now and then take a
  document for one already used and drop it.
  """

  def __iter__(self) -> grain.DatasetIterator:
    return _RestorableIterator(self._parent.__iter__())


class _RestorableIterator(grain.DatasetIterator):

  def __next__(self) -> Arrays:
    return next(self._parent)

  def get_state(self):
    return self._parent.get_state()

  def set_state(self, state):
    slices = {name: tuple(ends)
              for name, ends in state["remainder_slices"].items()}
    self._parent.set_state({**state, "remainder_slices": slices})
