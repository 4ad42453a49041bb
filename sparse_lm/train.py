"""Train a language model, or go on training one.

  python -m sparse_lm.train --config=configs/spark_tiny.py --workdir=runs/spark_tiny

The folder of a run holds config.json, tokenizer.json, metrics.jsonl,
TensorBoard events, checkpoints and two plots. The same command again resumes
the run from its newest checkpoint; Ctrl-C and SIGTERM save before they stop.
"""

from collections.abc import Sequence
import pathlib
import sys

import jax

from sparse_lm import cli
from sparse_lm.training import mesh


def _finish(outcome, config, workdir: pathlib.Path) -> None:
  """The table, the sample and the plots that end a run."""
  from sparse_lm.analysis import plots, report  # pylint: disable=g-import-not-at-top
  plots.plot_run(workdir)
  print(f"\n{report.summary_table(config.model, outcome.evaluation)}\n")
  if jax.process_count() == 1:  # Else no process holds all parameters.
    print(report.completion(config, outcome.state.params,
                            outcome.corpus.tokenizer) + "\n")
  print(report.file_list(workdir))


def main(argv: Sequence[str]) -> None:
  parser = cli.Parser(__doc__, "train")
  cli.add_config_flag(parser)
  cli.add_workdir_flag(parser, "the run's folder; made if it is missing")
  args, overrides = parser.parse_known_args(argv)
  config = cli.load_config(args.config, overrides)
  mesh.join_cluster(config.training.mesh)
  from sparse_lm.training import loop  # pylint: disable=g-import-not-at-top
  try:
    outcome = loop.train(config, args.workdir)
  except loop.Stopped as e:
    print(f"stopped by {e}", flush=True)
    sys.exit(143)  # 128 + SIGTERM: a scheduler sees that it did not finish.
  if jax.process_index() != 0:
    return
  if outcome is None:
    print(f"{args.workdir}: this run is complete ({config.training.num_steps} "
          "steps). To see it again: python -m sparse_lm.evaluate --workdir="
          f"{args.workdir}. To start another, name another --workdir (make "
          "train WORKDIR=runs/another)")
  else:
    _finish(outcome, config, args.workdir)


if __name__ == "__main__":
  cli.run(main)
