"""What the dataset builders share: files in, distinct documents out.

A document's split depends on its text alone (save in a tiny corpus, see
`_fill_empty`), so that adding a file moves no other file.
"""

from collections.abc import Iterable, Iterator
import collections
import hashlib
import os
import pathlib

import tensorflow_datasets as tfds

from sparse_lm.errors import UserError

Path = pathlib.Path
Folder = tuple[Path, frozenset[str]]  # a folder, and subfolder names to skip

_SPLITS = ("train", "validation", "test")
_IN_TWENTY = {0: "validation", 1: "test"}  # the other 18 are "train"


def digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def split_of(text_digest: str) -> str:
  """One document in 20 is for validation, one for the test, the rest train."""
  return _IN_TWENTY.get(int(text_digest, 16) % 20, "train")


def _fill_empty(splits: dict[str, set[str]]) -> None:
  """Moves a document of the largest split to each empty one.

  Args:
    splits: the digests of each split, three or more in all. Changed in place.
  """
  for name in _SPLITS:
    if not splits[name]:
      largest = max(_SPLITS, key=lambda other: len(splits[other]))
      moved = min(splits[largest])
      splits[largest].remove(moved)
      splits[name].add(moved)


def list_files(folders: Iterable[Folder],
               suffixes: frozenset[str]) -> list[tuple[Path, str]]:
  """(file, path relative to its folder), sorted; hidden names are left out."""
  found = []
  for folder, skipped in folders:
    for parent, subfolders, names in os.walk(folder):
      subfolders[:] = [name for name in subfolders
                       if not name.startswith(".") and name not in skipped]
      files = [Path(parent, name) for name in names
               if not name.startswith(".")
               and os.path.splitext(name)[1] in suffixes]
      found += [(file, file.relative_to(folder).as_posix()) for file in files]
  return sorted(found, key=lambda item: (item[1], item[0]))


def listing_key(files: Iterable[tuple[Path, str]], *more: str) -> str:
  """A short key that changes when a file is added, removed or written to."""
  key = hashlib.sha256(repr(more).encode())
  for file, _ in files:
    try:
      status = file.stat()
    except OSError:
      continue  # a dangling link; reading will count it as skipped
    key.update(repr((str(file), status.st_size, status.st_mtime_ns)).encode())
  return key.hexdigest()[:12]


class DocumentBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A TFDS builder over documents; a subclass says which.

  `info.metadata` records how many documents were kept and dropped, and a
  fingerprint of those kept.
  """

  VERSION = tfds.core.Version("1.0.0")

  def documents(self) -> Iterator[tuple[str, bytes | str]]:
    """(path, text), in a fixed order; bytes where the text is not UTF-8."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict({
            "text": tfds.features.Text(), "path": tfds.features.Text()}),
        metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    splits = self._scan()
    if sum(map(len, splits.values())) < len(_SPLITS):
      raise UserError(
          f"config.data.dataset: {self.name} needs three documents, one for "
          f"each split, but holds {self.summary()}")
    _fill_empty(splits)  # TFDS accepts no split without examples
    return {name: self._generate_examples(splits[name]) for name in _SPLITS}

  def _scan(self) -> dict[str, set[str]]:
    """The digests of each split, by content alone."""
    splits = collections.defaultdict(set)
    counts = collections.Counter()
    fingerprint = 0
    for _, text in self.documents():
      if isinstance(text, bytes):
        counts["undecodable"] += 1
        continue
      if not text.strip():
        counts["empty"] += 1
        continue
      key = digest(text)
      if key in splits[split_of(key)]:
        counts["duplicates"] += 1
        continue
      splits[split_of(key)].add(key)
      counts["documents"] += 1
      counts["bytes"] += len(text.encode())
      fingerprint ^= int(key, 16)  # the same in any order
    self.info.metadata.update(counts, fingerprint=f"{fingerprint:064x}")
    return splits

  def _generate_examples(self, digests: set[str]):
    remaining = set(digests)
    for path, text in self.documents():
      if isinstance(text, str) and (key := digest(text)) in remaining:
        remaining.remove(key)
        yield key, {"text": text, "path": path}

  def summary(self) -> str:
    """What was kept and dropped, in one line."""
    counts = collections.Counter(self.info.metadata)
    return (f"{counts['documents']:,} documents, "
            f"{counts['bytes'] / 1e6:.1f} MB, "
            f"{counts['duplicates']:,} duplicates dropped, "
            f"{counts['empty']:,} empty, "
            f"{counts['undecodable']:,} undecodable skipped")


def read_text(file: Path) -> bytes | str:
  """The file's text, or bytes if it is not UTF-8 or cannot be read."""
  try:
    return decode(file.read_bytes())
  except OSError:
    return b""


def decode(data: bytes) -> bytes | str:
  try:
    return data.decode()
  except UnicodeDecodeError:
    return data
