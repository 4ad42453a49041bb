"""Datasets of TFDS by name, with one defined here."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparse_lm import config as config_lib
from sparse_lm.data import pipeline, prepare
from sparse_lm.errors import UserError


class FakeSongs(tfds.core.GeneratorBasedBuilder):
  """A hundred songs under `lyrics`."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({
            "lyrics": tfds.features.Text(),
            "title": tfds.features.Text(),
            "year": tfds.features.Scalar(np.int32)}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(100)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"lyrics": f"la {i} é", "title": str(i), "year": i}


class FakeOffline(FakeSongs):
  """A dataset that must be downloaded, and cannot be."""

  def _split_generators(self, dl_manager):
    raise ConnectionError("no route\nto host")


@pytest.fixture(scope="module")
def config(cache):
  return config_lib.replace(config_lib.Config(), **{
      "data.dataset": "fake_songs", "data.text_key": "lyrics",
      "data.train_split": "train[:90%]", "data.eval_split": "train[90%:]",
      "data.cache_dir": str(cache), "data.tokenizer": "bytes",
      "model.vocab_size": 257, "model.context_length": 32,
      "training.batch_size": 4})


def test_named_dataset_through_the_same_path(config):
  corpus = pipeline.open_corpus(config)
  builder = prepare.prepare(config.data)
  train = prepare.open_documents(builder, config.data, "train_split")
  held_out = prepare.open_documents(builder, config.data, "eval_split")
  assert (len(train), len(held_out)) == (90, 10)
  texts = {train[i] for i in range(90)} | {held_out[i] for i in range(10)}
  assert texts == {f"la {i} é" for i in range(100)}
  batches = list(corpus.evaluation())
  predicted = sum(len(held_out[i].encode()) + 1 for i in range(10))
  assert sum(batch["weights_BxL"].sum() for batch in batches) == predicted


def test_trained_tokenizer_is_kept_per_split(config, capsys):
  bpe = config_lib.replace(config, **{
      "data.tokenizer": "bpe", "model.vocab_size": 280})
  prepare.prepare(config.data)
  capsys.readouterr()
  first = pipeline.open_corpus(bpe).tokenizer
  assert capsys.readouterr() == (
      "", "fake_songs: bpe tokenizer of 280 tokens\n")
  folder = prepare.prepare(config.data).data_path
  assert len(list(folder.glob("bpe-280-*"))) == 1
  assert pipeline.open_corpus(bpe).tokenizer.to_json() == first.to_json()
  assert len(list(folder.glob("bpe-*"))) == 1
  pipeline.open_corpus(
      config_lib.replace(bpe, **{"data.train_split": "train[:10%]"}))
  assert len(list(folder.glob("bpe-280-*"))) == 2


@pytest.mark.parametrize("name", ["lm1b", "c4", "wiki40b/en",
                                  "tiny_shakespeare"])
def test_real_datasets_are_known(name, tmp_path):
  builder = prepare._named_builder(name, tmp_path)
  prepare._check_text_key(builder, "text")


@pytest.mark.parametrize("changes, message", [
    ({"data.dataset": "fake_song"},
     r"config.data.dataset: TFDS knows no 'fake_song'; nearest: fake_songs"),
    ({"data.dataset": "text_folder/x"},
     r"config.data.dataset: TFDS knows no .*; nearest: text_folder"),
    ({"data.dataset": "python_source/all"},
     r"config.data.dataset: .* python_source/stdlib, python_source/env"),
    ({"data.dataset": "wiki40b/elvish"}, r"config.data.dataset: .*elvish"),
    ({"data.dataset": "fake_offline"},
     r"config.data.dataset: cannot prepare fake_offline: no route to host"),
    ({"data.eval_split": "validation"},
     r"config.data.eval_split: no split 'validation' .* train \(100"),
    ({"data.train_split": "train[oops"}, r"config.data.train_split: no split"),
    ({"data.train_split": "train[:0]"},
     r"config.data.train_split: .* holds no document"),
    ({"data.text_key": "year"},
     r"config.data.text_key: 'year' is not .* lyrics, title"),
])
def test_mistakes(config, changes, message):
  with pytest.raises(UserError, match=message) as raised:
    pipeline.open_corpus(config_lib.replace(config, **changes))
  assert "\n" not in str(raised.value)
