"""ProSparse's third step: ReLU to FATReLU, by a sweep on held-out data.

arXiv 2402.13516, Section 3.3: after training, activations below a threshold
are set to 0 too. Here the threshold is the largest of some candidates at which
the perplexity of the validation split stays within a tolerance of ReLU's own.
"""

from collections.abc import Callable, Sequence
import json
import math
import pathlib
import shutil
from typing import Any

import jax

from sparse_lm import config as config_lib
from sparse_lm.config import Config
from sparse_lm.errors import UserError
from sparse_lm.training import checkpoint, evaluation, metrics, workdir

FILE = "threshold_sweep.json"


def shifted(config: Config, threshold: float) -> Config:
  """The config with FATReLU at a threshold in place of ReLU.

  Raises:
    UserError: where its activation is neither, or the threshold is another's.
  """
  ffn = config.model.ffn
  if ffn.activation not in ("relu", "fatrelu"):
    raise UserError("config.model.ffn.activation: only relu (or fatrelu) can "
                    f"be shifted, this run has {ffn.activation}")
  if ffn.up_activation in config_lib.WITH_THRESHOLD:
    raise UserError("config.model.ffn.up_activation: shares the threshold, "
                    f"which {ffn.up_activation} was trained with")
  return config_lib.replace(config, **{
      "model.ffn.activation": "fatrelu", "model.ffn.threshold": threshold})


def choose(rows: Sequence[dict[str, Any]], tolerance: float) -> dict[str, Any]:
  """The row of the largest threshold within the tolerance.

  Args:
    rows: with `threshold` and `perplexity`; the first is the run as it is.
    tolerance: how much the perplexity may rise above that one's, relative.

  Raises:
    UserError: where the run's own perplexity is no number.
  """
  limit = (1 + tolerance) * rows[0]["perplexity"]
  if not math.isfinite(limit):
    raise UserError("--workdir: the run's own loss is not a finite number")
  return max((row for row in rows if row["perplexity"] <= limit),
             key=lambda row: row["threshold"])


def sweep(folder: pathlib.Path, output: pathlib.Path,
          thresholds: Sequence[float], tolerance: float, batches: int | None,
          report: Callable[[str], None]) -> dict[str, Any]:
  """Shifts the run in `folder` and writes it to `output` as a run of its own.

  It is written beside `output` and renamed, so that no half of it is left.
  The threshold is chosen on the split whose loss is then reported: compare it
  with others on the test split.

  Args:
    folder: a finished run whose FFN has ReLU, or FATReLU already.
    output: does not exist yet; it can be evaluated and decoded from.
    thresholds: the candidates; the run's own (0 for ReLU) is always one, and
      smaller ones are left out.
    tolerance: relative rise of the perplexity that is allowed.
    batches: of the validation split, at most; None: all.
    report: told about each candidate.

  Returns:
    The chosen row: `metrics.summarize`'s values with its `threshold`.

  Raises:
    UserError: where there is nothing to shift, or nothing to choose by.
  """
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise UserError(f"--output={output}: exists already")
  own = workdir.read_config(folder)
  shifted(own, 0.0)
  if not checkpoint.is_saved(folder, own.training.num_steps):
    raise UserError(f"--workdir={folder}: its run is not finished")
  config, corpus, step, params = evaluation.open_run(
      folder, report, own.training.num_steps)
  lowest, rows = own.model.ffn.threshold, []
  for threshold in sorted({lowest, *(t for t in thresholds if t > lowest)}):
    result = evaluation.evaluate_params(shifted(config, threshold), params,
                                        corpus, batches=batches)
    rows.append(dict(threshold=threshold, step=step, **result))
    report(f"threshold {threshold:<8g} perplexity {result['perplexity']:10.3f}"
           f"  non-zero outputs {result['hidden_fraction']:.2%}")
  chosen = choose(rows, tolerance)
  partial = output.with_name(f"{output.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  _write(partial, shifted(config, chosen["threshold"]), corpus, params,
         dict(chosen=chosen["threshold"], tolerance=tolerance,
              thresholds=list(thresholds), candidates=rows), chosen)
  partial.replace(output)
  return chosen


def _write(output: pathlib.Path, config: Config, corpus, params: Any,
           record: dict[str, Any], chosen: dict[str, Any]) -> None:
  workdir.check(output, config)
  checkpoint.save_params(output, chosen["step"], jax.device_get(params))
  writer = metrics.MetricsWriter(output, chosen["step"])
  writer.write(chosen["step"], "eval", {
      key: value for key, value in chosen.items()
      if key not in ("step", "split")})
  writer.close()
  workdir.write_whole(output / FILE, json.dumps(record, indent=1) + "\n")
  workdir.record(output, config, corpus)
