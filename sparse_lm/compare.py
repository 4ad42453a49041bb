"""Train a suite of configs one after another, and compare them.

  python -m sparse_lm.compare --suite=configs/suites/ffn_methods.py --workdir=runs/ffn_methods

Writes results/<suite>.json, .md and .png. The same command goes on where it was
stopped. Keys can be overridden in all trained configs at once, as in
--config.data.cache_dir=/scratch. Two processes may each train other methods
(--only) in the same workdir; the table has every run that is finished there.
"""

from collections.abc import Sequence
import functools
import pathlib
import sys

from sparse_lm import cli
from sparse_lm.errors import UserError


def _seeds(text: str) -> list[int]:
  try:
    seeds = [int(x) for x in text.split(",")]
  except ValueError:
    raise UserError(f"--seeds={text}: is not a list such as 0,1") from None
  if len(set(seeds)) < len(seeds) or min(seeds) < 0:
    raise UserError(f"--seeds={text}: must be different numbers from 0")
  return seeds


def main(argv: Sequence[str]) -> None:
  parser = cli.Parser(__doc__, "compare")
  parser.add_argument("--suite", required=True, metavar="FILE",
                      help="a suite's file, or the name of a shipped one such "
                      "as suites.ffn_methods")
  parser.add_argument("--size", default="tiny",
                      help="given to the file's get_suite (default: tiny)")
  cli.add_workdir_flag(parser, "where the runs' folders go")
  parser.add_argument("--results", type=pathlib.Path, metavar="FOLDER",
                      default=pathlib.Path("results"),
                      help="where the comparison goes (default: results)")
  parser.add_argument("--seeds", default="0",
                      help="seeds to train each method with (default: 0)")
  parser.add_argument("--only", default="", metavar="NAMES",
                      help="methods to train, by name, with those that they "
                      "start from (default: all)")
  args, overrides = parser.parse_known_args(argv)
  from sparse_lm.analysis import comparison  # pylint: disable=g-import-not-at-top
  from sparse_lm.training import loop, suite as suite_lib  # pylint: disable=g-import-not-at-top
  spec = args.suite if ":" in args.suite else f"{args.suite}:{args.size}"
  suite = cli.load_object("--suite", spec, "get_suite", suite_lib.Suite)
  seeds = _seeds(args.seeds)
  only = [name for name in args.only.split(",") if name]
  part = suite.part(only, lambda config: cli.override(config, overrides))
  try:
    failed = suite_lib.run(part, args.workdir, seeds,
                           functools.partial(print, flush=True))
  except loop.Stopped as e:
    print(f"stopped by {e}", flush=True)
    sys.exit(143)  # 128 + SIGTERM, as train.
  results = suite_lib.collect(suite, args.workdir)
  paths = comparison.write(results, args.results)
  print("\n" + comparison.loss_table(results) + "\n")
  print("\n".join(map(str, paths)))
  if failed:
    raise UserError("; ".join(failed))


if __name__ == "__main__":
  cli.run(main)
