"""A small folder of text and configs that read it."""

import pathlib

import pytest

from sparse_lm import config as config_lib


def write_folder(folder: pathlib.Path, count: int = 60) -> pathlib.Path:
  """`count` documents of 20 to 200 bytes, no two alike."""
  folder.mkdir()
  for i in range(count):
    words = " ".join(f"word{i}_{j}" for j in range(2 + i * 7 % 19))
    (folder / f"{i}.txt").write_text(words + " é😀\n", encoding="utf-8")
  return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("user") / "folder")


@pytest.fixture(scope="session")
def config(folder, cache):
  return config_lib.replace(config_lib.Config(), **{
      "data.dataset": "text_folder", "data.path": str(folder),
      "data.cache_dir": str(cache), "data.tokenizer": "bytes",
      "data.shuffle_window": 24, "model.vocab_size": 257,
      "model.context_length": 32, "training.batch_size": 4})
