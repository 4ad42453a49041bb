"""Measuring a trained model on held-out data."""

from collections.abc import Callable
import pathlib
from typing import Any

from flax import nnx
import jax
import numpy as np

from sparse_lm.config import Config
from sparse_lm.model.transformer import model_graph
from sparse_lm.training import checkpoint, metrics, workdir
from sparse_lm.training.step import make_eval_step


def evaluate_params(config: Config, params: Any, corpus, split: str = "",
                    batches: int | None = None) -> dict[str, Any]:
  """Loss and sparsity of parameters.

  Args:
    config: the model's and the batches'.
    params: as training has them.
    corpus: a `sparse_lm.data.pipeline.Corpus`.
    split: of the dataset; "": the config's data.eval_split.
    batches: at most so many batches; None: the whole split.

  Returns:
    `metrics.summarize`'s values, the split and the token count.
  """
  run = jax.jit(make_eval_step(config, metrics.text_bytes(config.model,
                                                          corpus.tokenizer)))
  sums = metrics.add_up([run(params, batch) for batch in
                         corpus.evaluation(split=split or None,
                                           batches=batches)])
  return dict(split=split or config.data.eval_split, tokens=int(sums.tokens),
              **metrics.summarize(sums, config.model))


def evaluate_run(folder: pathlib.Path, report: Callable[[str], None],
                 split: str = "", batches: int | None = None,
                 step: int | None = None,
                 scores: pathlib.Path | None = None) -> dict[str, Any]:
  """`evaluate_params` of a run's checkpoint, and its step.

  Args:
    folder: of the run.
    report: told when a damaged checkpoint is passed over.
    split: as there.
    batches: as there.
    step: which checkpoint; None: the newest readable one.
    scores: a file for `record_scores`, of 32 tokens; None: none.
  """
  config, corpus, step, params = open_run(folder, report, step)
  if scores is not None:
    np.save(scores, record_scores(config, params, corpus, 32))
  return dict(step=step,
              **evaluate_params(config, params, corpus, split, batches))


def record_scores(config: Config, params: Any, corpus, tokens: int
                  ) -> np.ndarray:
  """Scores of each layer's neurons for some held-out tokens, (N, T, F).

  The tokens are spread over the first batch, so that few are of one document.
  """
  batch = next(iter(corpus.evaluation(batches=1)))

  @jax.jit
  def run(params, batch):
    model = nnx.merge(model_graph(config.model), params)
    statistics = model.hidden(
        batch["tokens_BxL"], batch["positions_BxL"], batch["segment_ids_BxL"],
        measures=("scores",))[1]
    return statistics.sums["scores"]

  scores_NxBxLxF = jax.device_get(run(params, batch))
  scores = scores_NxBxLxF.reshape(len(scores_NxBxLxF), -1,
                                  scores_NxBxLxF.shape[-1])
  used = np.flatnonzero(np.asarray(batch["segment_ids_BxL"]))
  chosen = used[np.linspace(0, len(used) - 1, tokens).astype(int)]
  return scores[:, chosen].astype(np.float16)


def open_run(folder: pathlib.Path, report: Callable[[str], None],
             step: int | None = None):
  """A run's config, corpus, checkpoint's step and parameters."""
  # Here, not at the top: a command's --help needs no TFDS.
  from sparse_lm.data.pipeline import open_corpus  # pylint: disable=g-import-not-at-top
  config = workdir.read_config(folder)
  step, params = checkpoint.load_run_params(folder, config, report, step)
  corpus = open_corpus(config)
  workdir.check_data(folder, corpus.fingerprint)
  return config, corpus, step, params
