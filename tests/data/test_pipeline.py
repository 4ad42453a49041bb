"""Packing, sharding, shuffling, evaluation and exact resumption."""

import collections
import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparse_lm import config as config_lib
from sparse_lm.data import pipeline, prepare
from sparse_lm.errors import UserError


@pytest.fixture(scope="module")
def corpus(config):
  return pipeline.open_corpus(config)


def texts(corpus, split="train"):
  data = corpus.config.data
  found = prepare.Documents(str(corpus._builder.data_dir), split,
                            data.text_key)
  return [found[i] for i in range(len(found))]


def take(dataset, count, state=None):
  """`count` batches, and the iterator's state after them."""
  iterator = iter(dataset)
  if state is not None:
    iterator.set_state(state)
  batches = list(itertools.islice(iterator, count))
  state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint does
  iterator.close()
  return batches, state


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def segments(batches):
  """(tokens, targets) of each segment, row by row."""
  for batch in batches:
    for tokens, targets, ids in zip(
        batch["tokens_BxL"], batch["targets_BxL"], batch["segment_ids_BxL"]):
      for segment in range(1, ids.max() + 1):
        yield tokens[ids == segment], targets[ids == segment]


def documents_of(corpus, batches):
  """Rejoins what the packer cut: a document ends at a boundary target."""
  ids, found, boundary = [], [], corpus.tokenizer.boundary_id
  for tokens, targets in segments(batches):
    if not ids:
      assert tokens[0] == boundary
    else:  # the rest of a document starts at the token predicted last
      assert tokens[0] == ids[-1]
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    assert boundary not in targets[:-1]
    ids.extend(targets)
    if targets[-1] == boundary:
      found.append(corpus.tokenizer.decode(ids))
      ids = []
  assert not ids
  return found


def test_batches_have_one_shape(corpus):
  kinds = {"tokens_BxL": np.int32, "targets_BxL": np.int32,
           "weights_BxL": np.float32, "segment_ids_BxL": np.int32,
           "positions_BxL": np.int32}
  train, _ = take(corpus.train(), 3)
  for batch in train + list(corpus.evaluation()):
    assert {name: array.dtype for name, array in batch.items()} == kinds
    assert all(array.shape == (4, 32) for array in batch.values())


def test_evaluation_is_every_document_once_in_order(corpus):
  batches = list(corpus.evaluation(split="train"))
  assert documents_of(corpus, batches) == texts(corpus)
  assert_same(batches, list(corpus.evaluation(split="train")))
  assert_same(batches[:2], list(corpus.evaluation(split="train", batches=2)))
  predicted = sum(len(text.encode()) + 1 for text in texts(corpus))
  assert sum(batch["weights_BxL"].sum() for batch in batches) == predicted
  for batch in batches:
    np.testing.assert_array_equal(
        batch["weights_BxL"], batch["segment_ids_BxL"] > 0)


def test_positions_count_within_segments(corpus):
  for batch in take(corpus.train(), 5)[0]:
    for ids, positions in zip(
        batch["segment_ids_BxL"], batch["positions_BxL"]):
      assert (np.diff(ids) >= 0).all() and ids[0] == 1  # and no padding
      for segment in range(1, ids.max() + 1):
        inside = positions[ids == segment]
        np.testing.assert_array_equal(inside, np.arange(len(inside)))


def test_evaluation_of_two_processes_is_that_of_one(corpus):
  whole = list(corpus.evaluation())
  parts = [list(corpus.evaluation(process_index=i, process_count=2))
           for i in range(2)]
  joined = [{name: np.concatenate([a[name], b[name]]) for name in a}
            for a, b in zip(*parts, strict=True)]
  assert_same(joined, whole)


def unshuffled(config):
  """A window of one row, so that rows leave the packer in order."""
  return pipeline.open_corpus(
      config_lib.replace(config, **{"data.shuffle_window": 1}))


def whole_documents(corpus, batches):
  """The documents of a stream that stops somewhere, maybe inside one."""
  boundary = corpus.tokenizer.boundary_id
  targets = np.concatenate([b["targets_BxL"].ravel() for b in batches])
  ends = np.flatnonzero(targets == boundary)
  return [corpus.tokenizer.decode(ids)
          for ids in np.split(targets, ends + 1)[:-1]]


def test_processes_share_the_documents_out(config):
  corpus = unshuffled(config)
  everything = collections.Counter(texts(corpus))
  shares = []
  for index in range(2):
    batches, _ = take(corpus.train(index, 2), 200)
    assert batches[0]["tokens_BxL"].shape == (2, 32)
    shares.append(set(whole_documents(corpus, batches)))
  assert not shares[0] & shares[1]
  assert shares[0] | shares[1] == set(everything)


def test_each_epoch_has_its_own_order(config):
  corpus = unshuffled(config)
  count = len(texts(corpus))
  found = whole_documents(corpus, take(corpus.train(), 150)[0])
  first, second = found[:count], found[count:2 * count]
  assert sorted(first) == sorted(second) == sorted(texts(corpus))
  assert first != second
  again = whole_documents(corpus, take(corpus.train(), 150)[0])
  assert again == found
  other = unshuffled(config_lib.replace(config, **{"training.seed": 1}))
  assert whole_documents(other, take(other.train(), 150)[0]) != found


def test_window_shuffles_rows(config, corpus):
  def rows(corpus):
    batches, _ = take(corpus.train(), 6)  # one window of 24 rows
    return [tuple(row) for b in batches for row in b["tokens_BxL"]]
  assert rows(corpus) != rows(unshuffled(config))
  assert sorted(rows(corpus)) == sorted(rows(unshuffled(config)))


# 6 batches are a window; an epoch is about 43 batches.
@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 42, 43, 44, 100])
def test_resumption_is_exact(corpus, count):
  batches, _ = take(corpus.train(), count + 60)
  _, state = take(corpus.train(), count)
  assert_same(take(corpus.train(), 60, state)[0], batches[count:])


def test_resumption_where_documents_fill_rows(config, tmp_path):
  """A row that ends with its document leaves the packer no remainder."""
  folder = tmp_path / "folder"
  folder.mkdir()
  for i in range(40):
    (folder / f"{i}.txt").write_text(f"{i:031d}")
  full = pipeline.open_corpus(
      config_lib.replace(config, **{"data.path": str(folder)}))
  batches, _ = take(full.train(), 30)
  for count in (0, 3, 6, 9, 12):
    _, state = take(full.train(), count)
    assert_same(take(full.train(), 10, state)[0], batches[count:count + 10])


def test_resumption_through_orbax(corpus, tmp_path):
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    iterator = iter(corpus.train())
    for _ in range(3):
      next(iterator)
    manager.save(3, args=grain.checkpoint.CheckpointSave(iterator))
    manager.wait_until_finished()
    following = list(itertools.islice(iterator, 50))
    iterator.close()
    restored = manager.restore(
        3, args=grain.checkpoint.CheckpointRestore(iter(corpus.train())))
    assert_same(list(itertools.islice(restored, 50)), following)
    restored.close()


def test_worker_processes_resume_exactly(config):
  corpus = pipeline.open_corpus(
      config_lib.replace(config, **{"data.num_workers": 2}))
  iterator = iter(corpus.train())
  assert next(iterator)["tokens_BxL"].shape == (4, 32)
  next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  following = list(itertools.islice(iterator, 20))
  iterator.close()
  assert_same(take(corpus.train(), 20, state)[0], following)


def test_fingerprint_follows_data_and_tokenizer(config, corpus, tmp_path):
  assert pipeline.open_corpus(config).fingerprint == corpus.fingerprint
  moved = config_lib.replace(config, **{"data.cache_dir": str(tmp_path)})
  assert pipeline.open_corpus(moved).fingerprint == corpus.fingerprint
  bpe = config_lib.replace(config, **{
      "data.tokenizer": "bpe", "model.vocab_size": 300})
  assert pipeline.open_corpus(bpe).fingerprint != corpus.fingerprint


@pytest.mark.parametrize("changes, message", [
    ({"model.context_length": 100_000},
     r"config.model.context_length: 100000 is longer than the data supplies"),
    ({"model.vocab_size": 256}, r"config.model.vocab_size: 256, .* 257 tokens"),
    ({"model.vocab_size": 513}, r"config.model.vocab_size: 513, .* 257 to 512"),
    ({"data.tokenizer": "bpe", "model.vocab_size": 200},
     r"config.model.vocab_size: 200 is too small for bpe"),
])
def test_mistakes(config, changes, message):
  with pytest.raises(UserError, match=message):
    pipeline.open_corpus(config_lib.replace(config, **changes))


def test_padded_vocabulary_is_no_mistake(config):
  pipeline.open_corpus(config_lib.replace(config, **{"model.vocab_size": 512}))


def test_mistakes_about_processes(corpus):
  with pytest.raises(UserError, match="config.training.batch_size: 4 is not"):
    corpus.train(0, 3)
  with pytest.raises(UserError, match="config.training.batch_size: 4 is not"):
    corpus.evaluation(process_count=3)
