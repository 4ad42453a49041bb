"""The dataset builders: what is kept, where it goes, when it is redone."""

import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import pytest

from sparse_lm import config as config_lib
from sparse_lm.data import documents, prepare
from sparse_lm.errors import UserError

_SPLITS = ("train", "validation", "test")


def data_config(cache, **values):
  return config_lib.DataConfig(cache_dir=str(cache), **values)


def folder_config(cache, folder, **values):
  return data_config(cache, dataset="text_folder", path=str(folder), **values)


def read(builder):
  """{split: {text, ...}}; fails on a text that comes twice."""
  found = {}
  for split in builder.info.splits:
    opened = prepare.Documents(str(builder.data_dir), split, "text")
    texts = [opened[i] for i in range(len(opened))]
    found[split] = set(texts)
    assert len(found[split]) == len(texts)
  return found


def joined(builder):
  return set().union(*read(builder).values())


@pytest.fixture(scope="session")
def stdlib(cache):
  return prepare.prepare(data_config(cache))


def test_stdlib_holds_the_standard_library_and_no_tests(stdlib):
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  texts = joined(stdlib)
  for name in ("argparse.py", "json/decoder.py", "asyncio/tasks.py"):
    assert (root / name).read_text("utf-8") in texts
  assert 500 < len(texts) < 2000
  paths = [os.fsdecode(example["path"])
           for split in _SPLITS for example in stdlib.as_data_source(split)]
  folders = {part for path in paths for part in path.split("/")[:-1]}
  assert not folders & {"test", "tests", "site-packages", "dist-packages"}
  assert not any(path.startswith("/") for path in paths)


def test_stdlib_splits_are_disjoint_and_by_content(stdlib):
  splits = read(stdlib)
  assert len(set().union(*splits.values())) == sum(map(len, splits.values()))
  residue = {"validation": {0}, "test": {1}, "train": set(range(2, 20))}
  for name, texts in splits.items():
    for text in texts:
      key = int(hashlib.sha256(text.encode()).hexdigest(), 16)
      assert key % 20 in residue[name]


def test_environment_adds_site_packages_but_not_the_project(
    tmp_path, monkeypatch):
  site = tmp_path / "site-packages"
  (site / "package" / "tests").mkdir(parents=True)
  (site / "package" / "tests" / "code.py").write_text("site = 1")
  project = tmp_path / "project"
  project.mkdir()
  (project / "mine.py").write_text("mine = 1")
  stdlib = tmp_path / "stdlib"
  stdlib.mkdir()
  (stdlib / "os.py").write_text("os = 1")
  (stdlib / "re.py").write_text("re = 1")
  monkeypatch.setattr(sysconfig, "get_path", lambda _: str(stdlib))
  monkeypatch.setattr(sys, "path", ["", str(project), str(site)])
  monkeypatch.chdir(project)
  builder = prepare.prepare(data_config(
      tmp_path / "cache", dataset="python_source/environment"))
  assert joined(builder) == {"site = 1", "os = 1", "re = 1"}


def test_text_folder_keeps_distinct_decodable_documents(tmp_path, capfd):
  folder = tmp_path / "folder"
  (folder / "sub").mkdir(parents=True)
  (folder / ".hidden").mkdir()
  (folder / "a.txt").write_text("one\r\n", newline="")
  (folder / "b.md").write_text("two é")
  (folder / "sub" / "c.py").write_text("three")
  (folder / "d.jsonl").write_text(
      '{"text": "four"}\n\n{"text": "two é"}\n{"text": "\\ud83d\\ude00"}\n'
      '{"text": "lone \\ud800"}\n')
  (folder / "e.txt").write_bytes(b"\xff\xfe")
  (folder / "f.txt").write_text(" \n")
  (folder / "g.csv").write_text("never")
  (folder / ".hidden" / "h.txt").write_text("never")
  builder = prepare.prepare(folder_config(tmp_path / "cache", folder))
  assert joined(builder) == {"one\r\n", "two é", "three", "four", "😀"}
  out, err = capfd.readouterr()
  assert out == ""  # kept for the results of a command
  assert err == (
      "text_folder: 5 documents, 0.0 MB, 1 duplicates dropped, 1 empty, "
      "2 undecodable skipped\n")
  again = prepare.prepare(folder_config(tmp_path / "cache", folder))
  assert again.data_dir == builder.data_dir
  assert capfd.readouterr() == ("", "")


def test_same_order_wherever_prepared(folder, tmp_path):
  orders = []
  for name in ("one", "two"):
    builder = prepare.prepare(folder_config(tmp_path / name, folder))
    opened = prepare.Documents(str(builder.data_dir), "train", "text")
    orders.append([opened[i] for i in range(len(opened))])
  assert orders[0] == orders[1]


def _texts_of(split, count):
  """`count` texts that go to `split` by their content."""
  texts = (f"text {i}" for i in itertools.count())
  found = (text for text in texts
           if documents.split_of(documents.digest(text)) == split)
  return list(itertools.islice(found, count))


@pytest.mark.parametrize("split", _SPLITS)
def test_small_folder_has_all_splits(tmp_path, split):
  folder = tmp_path / "folder"
  folder.mkdir()
  for i, text in enumerate(_texts_of(split, 3)):
    (folder / f"{i}.txt").write_text(text)
  splits = read(prepare.prepare(folder_config(tmp_path / "cache", folder)))
  assert {name: len(texts) for name, texts in splits.items()} == {
      "train": 1, "validation": 1, "test": 1}


def test_empty_splits_are_filled_from_the_largest():
  splits = {"train": {"a"}, "validation": {"d", "c", "b"}, "test": set()}
  documents._fill_empty(splits)
  assert splits == {"train": {"a"}, "validation": {"c", "d"}, "test": {"b"}}


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_documents(tmp_path, count):
  folder = tmp_path / "folder"
  folder.mkdir()
  for i in range(count):
    (folder / f"{i}.txt").write_text(f"text {i}")
  with pytest.raises(UserError, match="text_folder needs three documents, one "
                                      f"for each split, but holds {count} doc"):
    prepare.prepare(folder_config(tmp_path / "cache", folder))


def test_a_changed_folder_is_prepared_again(tmp_path):
  folder = tmp_path / "folder"
  folder.mkdir()
  config = folder_config(tmp_path / "cache", folder)
  for i in range(4):
    (folder / f"{i}.txt").write_text(f"text {i}")
  before = prepare.prepare(config)
  (folder / "0.txt").write_text("edit 0")  # as long as before
  after = prepare.prepare(config)
  assert joined(after) == {"edit 0", "text 1", "text 2", "text 3"}
  assert prepare.fingerprint(after) != prepare.fingerprint(before)
  (folder / "0.txt").unlink()
  assert joined(prepare.prepare(config)) == {"text 1", "text 2", "text 3"}


def _script(cache, folder, prologue=""):
  return [sys.executable, "-c", f"""
import os
from sparse_lm.config import DataConfig
from sparse_lm.data import documents, prepare
{prologue}
builder = prepare.prepare(DataConfig(
    dataset="text_folder", path={str(folder)!r}, cache_dir={str(cache)!r}))
"""]


def test_a_killed_preparation_leaves_nothing_that_is_used(folder, tmp_path):
  killed = subprocess.run(_script(tmp_path, folder, """
write = documents.DocumentBuilder._generate_examples
def die(self, digests):
  for count, example in enumerate(write(self, digests)):
    if count == 20:
      os._exit(9)
    yield example
documents.DocumentBuilder._generate_examples = die
"""), check=False)
  assert killed.returncode == 9
  assert list(tmp_path.rglob("incomplete.*"))  # it did get that far
  builder = prepare.prepare(folder_config(tmp_path, folder))
  assert len(joined(builder)) == 60


def test_two_processes_prepare_once(folder, tmp_path):
  both = [subprocess.Popen(_script(tmp_path, folder), stderr=subprocess.PIPE,
                           text=True) for _ in range(2)]
  printed = sorted(process.communicate()[1] for process in both)
  assert [process.returncode for process in both] == [0, 0]
  assert printed[0] == "" and printed[1].startswith("text_folder: 60 documents")
  assert len(joined(prepare.prepare(folder_config(tmp_path, folder)))) == 60


@pytest.mark.parametrize("line, message", [
    ('{"body": "x"}', r"text_key: .*d.jsonl:2 has no text under 'text'; it "
                      r"has body"),
    ("not json", r"d.jsonl:2: not JSON"),
    ("[1]", r"d.jsonl:2: a list, not an object"),
    ('{"text": 1}', r"d.jsonl:2 has no text under 'text'"),
])
def test_mistakes_in_jsonl(tmp_path, line, message):
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "d.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + line)
  with pytest.raises(UserError, match=message):
    prepare.prepare(folder_config(tmp_path / "cache", folder))
  assert not list(tmp_path.rglob("incomplete.*"))


def test_jsonl_under_another_key(tmp_path):
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "d.jsonl").write_text(
      '{"body": "x"}\n{"body": "y"}\n{"body": "z"}\n')
  config = folder_config(tmp_path / "cache", folder, text_key="body")
  builder = prepare.prepare(config)
  assert joined(builder) == {"x", "y", "z"}


def test_mistakes_about_the_folder(tmp_path):
  with pytest.raises(UserError, match="config.data.path: no such folder"):
    prepare.prepare(folder_config(tmp_path, tmp_path / "absent"))
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "a.csv").write_text("x")
  with pytest.raises(UserError, match=r"config.data.path: .* holds no .txt"):
    prepare.prepare(folder_config(tmp_path, tmp_path / "folder"))
  (tmp_path / "folder" / "a.txt").write_text("")
  with pytest.raises(UserError, match="needs three .* but holds 0 documents"):
    prepare.prepare(folder_config(tmp_path, tmp_path / "folder"))


def test_cache_that_cannot_be_written(folder, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="config.data.cache_dir: cannot write"):
    prepare.prepare(folder_config(tmp_path / "file" / "cache", folder))
