"""Measure the loss and the sparsity of a trained model.

  python -m sparse_lm.evaluate --workdir=runs/spark_tiny --split=test

Reads config, tokenizer and parameters from the run's folder, prepares the
run's data where they are missing, and prints a table.
"""

from collections.abc import Sequence
import json
import pathlib
import sys

from sparse_lm import cli
from sparse_lm.errors import UserError
from sparse_lm.training import evaluation, workdir


def _warn(line: str) -> None:
  print(line, file=sys.stderr)


def main(argv: Sequence[str]) -> None:
  parser = cli.Parser(__doc__, "evaluate")
  cli.add_workdir_flag(parser, "the run's folder, as given to train")
  parser.add_argument("--split", default="", help="which split of the run's "
                      "dataset (default: config.data.eval_split)")
  parser.add_argument("--batches", type=int, default=None, help="at most so "
                      "many batches (default: the whole split)")
  parser.add_argument("--step", type=int, default=None, help="which checkpoint "
                      "(default: the newest)")
  parser.add_argument("--scores", type=pathlib.Path, metavar="FILE.npy",
                      help="also write there the scores of each layer's "
                      "neurons for 32 tokens, for benchmark --scores")
  parser.add_argument("--json", action="store_true",
                      help="print one JSON object instead of a table")
  args = parser.parse_args(argv)
  if args.batches is not None and args.batches < 1:
    raise UserError(f"--batches={args.batches}: must be above 0")
  result = evaluation.evaluate_run(args.workdir, _warn, args.split,
                                   args.batches, args.step, args.scores)
  if args.json:
    print(json.dumps(result))
    return
  from sparse_lm.analysis import report  # pylint: disable=g-import-not-at-top
  print(f"{args.workdir}, step {result['step']}, split {result['split']}, "
        f"{result['tokens']:,} tokens")
  print(report.summary_table(workdir.read_config(args.workdir).model, result))


if __name__ == "__main__":
  cli.run(main)
