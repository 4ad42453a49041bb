"""A run's folder: its config, and whose it is."""

import json
import os
import pathlib
import tempfile
import time

import jax

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.errors import UserError
from sparse_lm.training.step import init_params

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


def check_data(workdir: pathlib.Path, fingerprint: str) -> None:
  """Checks that the folder's run, if there is one, is of these data.

  Raises:
    UserError: where it is of others.
  """
  path = workdir / DATA
  if path.exists() and (
      json.loads(path.read_text())["fingerprint"] != fingerprint):
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


def check_start(source: pathlib.Path, config: Config, tokenizer) -> None:
  """Checks that a run can start from the parameters of the run in `source`.

  Args:
    source: `config.training.start_from`.
    config: the new run's.
    tokenizer: the new run's; the parameters mean nothing with another.

  Raises:
    UserError: on another tokenizer, or parameters of other shapes.
  """
  key = f"config.training.start_from: {source}"
  try:
    theirs = read_config(source)
  except UserError as e:
    raise UserError(f"{key} holds no run") from e
  shapes = [_parameter_shapes(c) for c in (theirs, config)]
  for name in sorted(shapes[0].keys() | shapes[1].keys()):
    there, here = (s.get(name) for s in shapes)
    if there != here:
      raise UserError(f"{key} has {name} of shape {there}, this config "
                      f"{here}")
  if (source / TOKENIZER).read_text("utf-8") != tokenizer.to_json():
    raise UserError(f"{key} was trained with another tokenizer")


def _parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  params = jax.eval_shape(lambda: init_params(config))
  return {jax.tree_util.keystr(path, simple=True, separator="."): x.shape
          for path, x in jax.tree_util.tree_leaves_with_path(params)}


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
