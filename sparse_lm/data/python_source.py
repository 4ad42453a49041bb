"""TFDS builder of Python source code that every machine already has.

`python_source/stdlib` is the running interpreter's standard library, without
its tests and generated tables: about 10 MB. `python_source/environment` is
every package that the interpreter can import, for larger runs. Neither needs a
network.
"""

from collections.abc import Iterator
import pathlib
import sys
import sysconfig

import tensorflow_datasets as tfds

from sparse_lm.data import documents

_SITES = frozenset({"site-packages", "dist-packages"})
_SKIPPED = _SITES | {"__pycache__"}
_TESTS = frozenset({"test", "tests", "idle_test"})
# Generated: character maps and the text of the help pages. They are a fifth of
# the library's bytes, and a small model would learn little else.
_TABLES = frozenset({"encodings", "pydoc_data"})


def _folders(config_name: str) -> list[documents.Folder]:
  stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
  if config_name == "stdlib":
    return [(stdlib, _SKIPPED | _TESTS | _TABLES)]
  # Not all of sys.path: it holds the working folder and the user's projects.
  sites = {pathlib.Path(entry).resolve() for entry in sys.path
           if pathlib.Path(entry).name in _SITES}
  return [(stdlib, _SKIPPED)] + [(site, _SKIPPED) for site in sorted(sites)]


class PythonSource(documents.DocumentBuilder):
  """The .py files of the running interpreter."""

  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(
          name="stdlib", description="The standard library without its tests and "
          "generated tables."),
      tfds.core.BuilderConfig(
          name="environment", description="Everything that can be imported."),
  ]

  @classmethod
  def cache_key(cls, config_name: str) -> str:
    return documents.listing_key(cls._files(config_name), sys.version)

  @classmethod
  def _files(cls, config_name: str):
    return documents.list_files(_folders(config_name), frozenset({".py"}))

  def documents(self) -> Iterator[tuple[str, bytes | str]]:
    for file, path in self._files(self.builder_config.name):
      yield path, documents.read_text(file)
