"""Starting a run from another run's parameters, `training.start_from`."""

from collections.abc import Callable
import pathlib
from typing import Any

import jax

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.errors import UserError
from sparse_lm.training import checkpoint, workdir
from sparse_lm.training.step import abstract_params

_KEY = "config.training.start_from"


def check(source: pathlib.Path, config: Config, tokenizer) -> None:
  """Checks that a run can start from the parameters of the run in `source`.

  Args:
    source: `config.training.start_from`.
    config: the new run's.
    tokenizer: the new run's; the parameters mean nothing with another.

  Raises:
    UserError: on another tokenizer, or parameters of other shapes.
  """
  key = f"{_KEY}: {source}"
  try:
    theirs = workdir.read_config(source)
  except UserError as e:
    raise UserError(f"{key} holds no run") from e
  check_shapes(theirs, config, source)
  if (source / workdir.TOKENIZER).read_text("utf-8") != tokenizer.to_json():
    raise UserError(f"{key} was trained with another tokenizer")


def check_shapes(theirs: Config, config: Config, source: pathlib.Path) -> None:
  """Raises a `UserError` unless two configs' parameters have equal shapes."""
  shapes = [_parameter_shapes(c) for c in (theirs, config)]
  for name in sorted(shapes[0].keys() | shapes[1].keys()):
    there, here = (s.get(name) for s in shapes)
    if there != here:
      raise UserError(f"{_KEY}: {source} has {name} of shape {there}, this "
                      f"config {here}")


def _parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  params = abstract_params(config)
  return {jax.tree_util.keystr(path, simple=True, separator="."): x.shape
          for path, x in jax.tree_util.tree_leaves_with_path(params)}


def load(config: Config, params: Any, corpus, batches,
         report: Callable[[str], None]) -> Any:
  """The source run's parameters; its data go on where they are the same.

  Args:
    config: the new run's.
    params: shapes, types and shardings.
    corpus: the new run's `sparse_lm.data.pipeline.Corpus`.
    batches: the new run's iterator. It is set to where the source's was if both
      read the same batches in the same order, so that none is seen twice.
    report: told where the run starts.

  Raises:
    UserError: where there is no such checkpoint, or it does not fit.
  """
  training = config.training
  source = pathlib.Path(training.start_from)
  check(source, config, corpus.tokenizer)
  try:
    step, params = checkpoint.load_params(
        source, params, report, training.start_step or None,
        "config.training.start_step")
  except UserError as e:
    if str(e).startswith("config."):
      raise
    raise UserError(f"{_KEY}: {e}") from e
  same = _same_batches(source, config, corpus.fingerprint)
  if same:
    checkpoint.restore_data(source, step, batches)
  report(f"starting from {source}, step {step}; "
         + ("the data go on from there" if same
            else "its data are others, these start at their beginning"))
  return params


def _same_batches(source: pathlib.Path, config: Config,
                  fingerprint: str) -> bool:
  """Whether the source run read this run's batches, in this run's order."""
  keys = config_lib.differences(workdir.read_config(source), config)
  return workdir.read_fingerprint(source) == fingerprint and not any(
      key.startswith("data.") or key in (
          "training.seed", "training.batch_size", "model.context_length")
      for key in keys)
