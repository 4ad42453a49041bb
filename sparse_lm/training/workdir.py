"""A run's folder: its config, and whose it is."""

import json
import pathlib

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.errors import UserError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
DATA = "data.json"


def _write(path: pathlib.Path, text: str) -> None:
  """Writes through a temporary file, so that no reader sees half of it."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)


def claim(workdir: pathlib.Path, config: Config) -> None:
  """Makes the folder this config's, or checks that it already is.

  Raises:
    UserError: where it cannot be written, or holds another config's run.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / CONFIG).exists():
      differing = config_lib.differences(read_config(workdir), config)
      if differing:
        shown = ", ".join(f"config.{key}" for key in differing[:5])
        raise UserError(
            f"--workdir={workdir}: holds a run with another config (it differs "
            f"in {shown}{', ...' if differing[5:] else ''}); choose another "
            "workdir")
    _write(workdir / CONFIG, config_lib.to_json(config))
  except OSError as e:
    raise UserError(f"--workdir={workdir}: cannot be written "
                    f"({e.strerror})") from e


def claim_data(workdir: pathlib.Path, corpus) -> None:
  """Puts the tokenizer in the folder, or checks that the data are the same.

  Args:
    workdir: a folder that `claim` has accepted.
    corpus: a `sparse_lm.data.pipeline.Corpus`.

  Raises:
    UserError: where the run was trained on other data. The standard library
      of another Python is other data.
  """
  path = workdir / DATA
  if path.exists():
    if json.loads(path.read_text())["fingerprint"] != corpus.fingerprint:
      raise UserError(f"--workdir={workdir}: its run was trained on other "
                      "data or another tokenizer than config.data now gives; "
                      "choose another workdir")
    return
  corpus.tokenizer.save(workdir / TOKENIZER)
  _write(path, json.dumps({"fingerprint": corpus.fingerprint}) + "\n")


def read_config(workdir: pathlib.Path) -> Config:
  """The config of the run in a folder."""
  path = workdir / CONFIG
  try:
    return config_lib.from_dict(json.loads(path.read_text()))
  except FileNotFoundError as e:
    raise UserError(f"--workdir={workdir}: holds no run (no {CONFIG})") from e
  except (json.JSONDecodeError, AttributeError) as e:
    raise UserError(f"{path}: is not a config ({e})") from e
