"""ProSparse's third step: ReLU to FATReLU, by a sweep on held-out data.

arXiv 2402.13516, Section 3.3: after training, activations below a threshold
are set to 0 too. Here the threshold is the largest of some candidates at which
the perplexity of the validation split stays within a tolerance of ReLU's own.
"""

from collections.abc import Callable, Sequence
import json
import pathlib
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
    UserError: where its activation is neither.
  """
  if config.model.ffn.activation not in ("relu", "fatrelu"):
    raise UserError("config.model.ffn.activation: only relu (or fatrelu) can "
                    f"be shifted, this run has {config.model.ffn.activation}")
  return config_lib.replace(config, **{
      "model.ffn.activation": "fatrelu", "model.ffn.threshold": threshold})


def choose(rows: Sequence[dict[str, Any]], tolerance: float) -> dict[str, Any]:
  """The row of the largest threshold within the tolerance.

  Args:
    rows: with `threshold` and `perplexity`; one has threshold 0.
    tolerance: how much the perplexity may rise above that one's, relative.
  """
  limit = (1 + tolerance) * next(row["perplexity"] for row in rows
                                 if row["threshold"] == 0)
  return max((row for row in rows if row["perplexity"] <= limit),
             key=lambda row: row["threshold"])


def sweep(folder: pathlib.Path, output: pathlib.Path,
          thresholds: Sequence[float], tolerance: float, batches: int | None,
          report: Callable[[str], None]) -> dict[str, Any]:
  """Shifts the run in `folder` and writes it to `output` as a run of its own.

  Args:
    folder: a run whose FFN has ReLU.
    output: a folder that holds no run; it can be evaluated and decoded from.
    thresholds: the candidates; 0, ReLU itself, is always among them.
    tolerance: relative rise of the perplexity that is allowed.
    batches: of the validation split, at most; None: all.
    report: told about each candidate.

  Returns:
    The chosen row: `metrics.summarize`'s values with its `threshold`.

  Raises:
    UserError: where there is nothing to shift, or nothing to choose by.
  """
  if (output / workdir.CONFIG).exists():
    raise UserError(f"--output={output}: holds a run already")
  shifted(workdir.read_config(folder), 0.0)
  config, corpus, step, params = evaluation.open_run(folder, report)
  rows = []
  for threshold in sorted({0.0, *thresholds}):
    result = evaluation.evaluate_params(shifted(config, threshold), params,
                                        corpus, batches=batches)
    rows.append(dict(threshold=threshold, step=step, **result))
    report(f"threshold {threshold:<8g} perplexity {result['perplexity']:10.3f}"
           f"  non-zero outputs {result['hidden_fraction']:.2%}")
  chosen = choose(rows, tolerance)
  _write(output, shifted(config, chosen["threshold"]), corpus, params, rows,
         chosen)
  return chosen


def _write(output: pathlib.Path, config: Config, corpus, params: Any,
           rows: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
  workdir.check(output, config)
  checkpoint.save_params(output, chosen["step"], jax.device_get(params))
  writer = metrics.MetricsWriter(output, chosen["step"])
  writer.write(chosen["step"], "eval", {
      key: value for key, value in chosen.items()
      if key not in ("step", "split")})
  writer.close()
  workdir.write_whole(output / FILE, json.dumps(
      {"chosen": chosen["threshold"], "candidates": rows}, indent=1) + "\n")
  workdir.record(output, config, corpus)
