"""TFDS builder of a user's folder of text.

A .txt, .md or .py file is one document; each line of a .jsonl file is one.
"""

from collections.abc import Iterator
import json
import pathlib

from sparse_lm.data import documents
from sparse_lm.errors import UserError

_SUFFIXES = (".txt", ".md", ".py", ".jsonl")


def _list(path: str) -> list[tuple[pathlib.Path, str]]:
  folder = pathlib.Path(path).expanduser().resolve()
  if not folder.is_dir():
    raise UserError(f"config.data.path: no such folder: {path}")
  files = documents.list_files([(folder, frozenset())], frozenset(_SUFFIXES))
  if not files:
    raise UserError(f"config.data.path: {path} holds no "
                    f"{', '.join(_SUFFIXES)} file")
  return files


def _text_of_line(line: str, text_key: str, where: str) -> str:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f"{where}: not JSON: {error}") from error
  if not isinstance(record, dict):
    raise UserError(f"{where}: a {type(record).__name__}, not an object")
  if not isinstance(record.get(text_key), str):
    raise UserError(f"config.data.text_key: {where} has no text under "
                    f"{text_key!r}; it has {', '.join(record) or 'no keys'}")
  return record[text_key]


def _lines(file: pathlib.Path, path: str,
           text_key: str) -> Iterator[tuple[str, bytes | str]]:
  with file.open("rb") as lines:
    for number, data in enumerate(lines, 1):
      line = documents.decode(data)
      if isinstance(line, bytes):
        yield path, line
      elif line.strip():
        text = _text_of_line(line, text_key, f"{file}:{number}")
        # JSON can escape a lone surrogate, which has no UTF-8 form.
        yield path, documents.decode(text.encode(errors="surrogatepass"))


class TextFolder(documents.DocumentBuilder, skip_registration=True):
  """Documents under the folder `path`, which a dataset's name cannot carry."""

  def __init__(self, *, path: str, text_key: str, **kwargs):
    self._path, self._text_key = path, text_key
    super().__init__(**kwargs)

  @staticmethod
  def cache_key(path: str, text_key: str) -> str:
    return documents.listing_key(_list(path), text_key)

  def documents(self) -> Iterator[tuple[str, bytes | str]]:
    for file, path in _list(self._path):
      if file.suffix == ".jsonl":
        yield from _lines(file, path, self._text_key)
      else:
        yield path, documents.read_text(file)
