"""What the commands share: flags, the config, and errors in one line."""

import argparse
from collections.abc import Callable, Sequence
import importlib
import importlib.util
import os
import pathlib
import sys

from absl import flags
from absl import logging

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.errors import UserError


class Parser(argparse.ArgumentParser):
  """argparse whose errors are one line, as all errors here are."""

  def __init__(self, doc: str, command: str):
    super().__init__(prog=f"python -m sparse_lm.{command}", description=doc,
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)

  def error(self, message):
    raise UserError(f"{message}; see {self.prog} --help")


def load_object(flag: str, path: str, function: str, kind: type):
  """Calls a function of a file, or of a module in sparse_lm.configs by name.

  `path:argument` calls `function(argument)`, as ml_collections has it.

  Args:
    flag: that named the path, for messages.
    path: `FILE.py` or `name`, each with or without `:argument`.
    function: of the file, such as `get_config`.
    kind: what it must return.

  Raises:
    UserError: on a missing file, or anything that the file raises.
  """
  place, *arguments = path.split(":", 1)
  is_file, name = place.endswith(".py"), f"sparse_lm.configs.{place}"
  if not (os.path.isfile(place) if is_file else _exists(name)):
    raise UserError(f"{flag}={path}: no such file, nor one of that name in "
                    "sparse_lm.configs")
  try:
    if is_file:
      spec = importlib.util.spec_from_file_location("experiment", place)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
    else:
      module = importlib.import_module(name)
    made = getattr(module, function)(*arguments)
    if not isinstance(made, kind):
      raise TypeError(f"{function}() returned {made!r:.60}, not a "
                      f"{kind.__name__}")
    return made
  except UserError:
    raise
  except Exception as e:  # pylint: disable=broad-exception-caught
    # The file is the user's code: whatever it raises is theirs to mend.
    raise UserError(f"{flag}={path}: {type(e).__name__}: {e}") from e


def _exists(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # The package before the last dot.
    return False


def override(config: Config, overrides: Sequence[str]) -> Config:
  """The config with `--config.key=value` flags applied.

  Raises:
    UserError: on an unknown key, a value of the wrong type or one that a check
      refuses.
  """
  for argument in overrides:
    if argument.startswith("--config."):
      key = argument.removeprefix("--config.").split("=", 1)[0]
      config_lib.check_key(key, config)
    elif argument.startswith("--"):
      raise UserError(f"{argument}: not a flag or a config key; overrides look "
                      "like --config.training.num_steps=100")
  # Here, so that commands without a config do without the library.
  import ml_collections  # pylint: disable=g-import-not-at-top
  from ml_collections import config_flags  # pylint: disable=g-import-not-at-top

  values = ml_collections.ConfigDict(config_lib.to_dict(config))
  argv = ["", *overrides]
  try:
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", values, flag_values=parsed,
                                    sys_argv=argv)
    unused = parsed(argv)[1:]
  except (flags.Error, TypeError, ValueError) as e:
    raise UserError(" ".join(str(e).split()).removeprefix("flag ")) from e
  if unused:
    raise UserError(f"{unused[0]}: not a flag or a config key")
  return config_lib.from_dict(values.to_dict())


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
  """The config of a file, or of a shipped name, with overrides applied.

  Raises:
    UserError: as `load_object` and `override` do.
  """
  return override(load_object("--config", path, "get_config", Config),
                  overrides)


def add_config_flag(parser: Parser) -> None:
  parser.add_argument(
      "--config", required=True, metavar="FILE",
      help="a config file such as configs/spark_tiny.py, or the name of a "
      "shipped one such as spark_tiny or methods.drelu, with :ARGUMENT for its "
      "get_config (methods.drelu:small); any of its keys can be overridden, as "
      "in --config.model.ffn.active_fraction=0.05 (sparse_lm/config/ lists "
      "them all)")


def add_workdir_flag(parser: Parser, text: str) -> None:
  parser.add_argument("--workdir", required=True, type=pathlib.Path,
                      metavar="FOLDER", help=text)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a command; mistakes of the user's become one line and status 2."""
  # Grain's worker processes read absl's flags, which nothing here parses.
  flags.FLAGS.mark_as_parsed()
  # Libraries' warnings would bury the few lines that are meant to be read.
  logging.set_verbosity(logging.ERROR)
  try:
    main(sys.argv[1:])
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    sys.exit(130)  # 128 + SIGINT; the training loop saves and says so itself.
  except BrokenPipeError:
    # The reader of our output (head, less) went away.
    sys.stderr.close()
    sys.exit(141)  # 128 + SIGPIPE
