"""Make a ReLU model sparser without training: ReLU to FATReLU (ProSparse).

  python -m sparse_lm.shift_threshold --workdir=runs/prosparse --output=runs/prosparse_shifted

Tries thresholds on the run's validation split, takes the largest at which the
perplexity rises by no more than --tolerance, and writes a run that `evaluate`
and `generate` read as any other.
"""

from collections.abc import Sequence
import functools
import pathlib

from sparse_lm import cli
from sparse_lm.errors import UserError
from sparse_lm.training import threshold

# ProSparse's own candidates (arXiv 2402.13516, Table 9), and some above.
DEFAULT = "0.005,0.01,0.02,0.03,0.05,0.1,0.2"


def _thresholds(text: str) -> list[float]:
  try:
    values = [float(x) for x in text.split(",")]
  except ValueError:
    raise UserError(f"--thresholds={text}: is not a list such as {DEFAULT}"
                    ) from None
  if not all(0 <= x < float("inf") for x in values):
    raise UserError(f"--thresholds={text}: must not be negative")
  return values


def main(argv: Sequence[str]) -> None:
  parser = cli.Parser(__doc__, "shift_threshold")
  cli.add_workdir_flag(parser, "the run's folder, as given to train")
  parser.add_argument("--output", required=True, type=pathlib.Path,
                      metavar="FOLDER", help="where the shifted run goes")
  parser.add_argument("--thresholds", default=DEFAULT,
                      help=f"the candidates (default: {DEFAULT})")
  parser.add_argument("--tolerance", type=float, default=0.01,
                      help="how much the perplexity may rise, relative "
                      "(default: 0.01)")
  parser.add_argument("--batches", type=int, default=None, help="at most so "
                      "many batches (default: the whole validation split)")
  args = parser.parse_args(argv)
  if args.batches is not None and args.batches < 1:
    raise UserError(f"--batches={args.batches}: must be above 0")
  if not args.tolerance >= 0:
    raise UserError(f"--tolerance={args.tolerance}: must not be negative")
  chosen = threshold.sweep(args.workdir, args.output,
                           _thresholds(args.thresholds), args.tolerance,
                           args.batches, functools.partial(print, flush=True))
  print(f"chosen: threshold {chosen['threshold']:g}; {args.output} can be "
        "evaluated and decoded from")


if __name__ == "__main__":
  cli.run(main)
