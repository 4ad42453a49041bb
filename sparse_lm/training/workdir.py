"""A run's folder: its config, and whose it is."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
import time

import jax

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.errors import UserError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
DATA = "data.json"
HARDWARE = "hardware.json"


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes through a temporary file, so that no reader sees half of it."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)


def check(workdir: pathlib.Path, config: Config) -> None:
  """Makes the folder, and checks that no other config's run is in it.

  Raises:
    UserError: where it cannot be made, or holds another config's run.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise _unwritable(workdir, e) from e
  if not (workdir / CONFIG).exists():
    return
  differing = config_lib.differences(read_config(workdir), config)
  if differing:
    shown = ", ".join(f"config.{key}" for key in differing[:5])
    raise UserError(
        f"--workdir={workdir}: holds a run with another config (it differs in "
        f"{shown}{', ...' if differing[5:] else ''}); choose another workdir")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds a run's folder, so that no other process trains in it meanwhile.

  Of a cluster's processes the first one holds it.

  Raises:
    UserError: where another process does.
  """
  with (workdir / ".lock").open("w") as file:
    if jax.process_index() == 0:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise UserError(f"--workdir={workdir}: another process is training "
                        "there") from e
    yield  # Closing the file lets it go.


def read_fingerprint(workdir: pathlib.Path) -> str:
  """The fingerprint of the data that the folder's run is of."""
  return json.loads((workdir / DATA).read_text())["fingerprint"]


def check_data(workdir: pathlib.Path, fingerprint: str) -> None:
  """Checks that the folder's run, if there is one, is of these data.

  Raises:
    UserError: where it is of others.
  """
  if (workdir / DATA).exists() and read_fingerprint(workdir) != fingerprint:
    raise UserError(f"--workdir={workdir}: its run was trained on other data "
                    "or another tokenizer than config.data now gives (the "
                    "standard library of another Python is other data)")


def record(workdir: pathlib.Path, config: Config, corpus) -> None:
  """Makes the folder this run's: its tokenizer, data, hardware and config.

  Call it when nothing can be refused any more, so that a start that failed
  leaves no run behind.

  Args:
    workdir: a folder that `check` and `check_data` have accepted.
    config: the run's.
    corpus: the run's `sparse_lm.data.pipeline.Corpus`.
  """
  try:
    corpus.tokenizer.save(workdir / TOKENIZER)
    write_whole(workdir / DATA,
                json.dumps({"fingerprint": corpus.fingerprint}) + "\n")
    write_whole(workdir / HARDWARE, json.dumps(hardware()) + "\n")
    write_whole(workdir / CONFIG, config_lib.to_json(config))
  except OSError as e:
    raise _unwritable(workdir, e) from e


def hardware() -> dict[str, str]:
  """What this process runs on: `device`, `jax`, `date`."""
  device = jax.devices()[0]
  kind = (f"{os.cpu_count()} CPU cores" if device.platform == "cpu"
          else f"{jax.device_count()} x {device.device_kind}")
  return {"device": kind, "jax": jax.__version__,
          "date": time.strftime("%Y-%m-%d")}


def _unwritable(workdir: pathlib.Path, error: OSError) -> UserError:
  return UserError(f"--workdir={workdir}: cannot be written "
                   f"({error.strerror})")


def read_config(workdir: pathlib.Path) -> Config:
  """The config of the run in a folder."""
  path = workdir / CONFIG
  try:
    return config_lib.from_dict(json.loads(path.read_text()))
  except FileNotFoundError as e:
    raise UserError(f"--workdir={workdir}: holds no run (no {CONFIG})") from e
  except (json.JSONDecodeError, AttributeError) as e:
    raise UserError(f"{path}: is not a config ({e})") from e
