"""What is measured while training, and where it is written."""

from collections.abc import Iterator
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from sparse_lm.config import ModelConfig
from sparse_lm.training.step import Sums
from sparse_lm.training.workdir import write_whole

FILE = "metrics.jsonl"


def text_bytes(model: ModelConfig, tokenizer) -> np.ndarray:
  """Bytes of text per token id (V,), float32; 0 for ids that pad the model's."""
  table_V = np.zeros(model.vocab_size, np.float32)
  known = tokenizer.token_bytes_V
  table_V[:len(known)] = known
  return table_V


def summarize(sums: Sums, model: ModelConfig) -> dict[str, Any]:
  """Means over tokens from sums; per-layer lists have names that end in _N.

  Args:
    sums: on the host.
    model: gives the number of neurons.

  Returns:
    loss (nats per token), perplexity, bits_per_byte, z_loss, active_fraction
    (of all neurons), attended_keys and visible_keys (per query, mean over
    layers and heads), and the same per layer.
  """
  stats = sums.statistics
  loss = float(sums.loss / sums.tokens)
  active_N = stats.active_neurons_N / stats.tokens / model.ffn.num_neurons
  attended_N = stats.attended_keys_N / stats.tokens
  visible_N = stats.visible_keys_N / stats.tokens
  return {
      "loss": loss,
      "perplexity": math.exp(min(loss, 700)),
      "bits_per_byte": float(sums.loss / math.log(2) / sums.text_bytes),
      "z_loss": float(sums.z_loss / sums.tokens),
      "active_fraction": float(active_N.mean()),
      "attended_keys": float(attended_N.mean()),
      "visible_keys": float(visible_N.mean()),
      "active_fraction_N": active_N.tolist(),
      "attended_keys_N": attended_N.tolist(),
      "visible_keys_N": visible_N.tolist(),
  }


def add_up(window: list[Sums]) -> Sums:
  """The total of several steps' sums, fetched to the host at once."""
  host = jax.device_get(window)
  return jax.tree.map(lambda *xs: np.sum(xs, axis=0, dtype=np.float64), *host)


def read(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The lines of a run's metrics.jsonl; one cut short by a crash is skipped."""
  path = workdir / FILE
  if path.exists():
    with path.open() as lines:
      for line in lines:
        try:
          yield json.loads(line)
        except json.JSONDecodeError:
          continue


class MetricsWriter:
  """Appends to metrics.jsonl and to TensorBoard events, in process 0 alone."""

  def __init__(self, workdir: pathlib.Path, step: int):
    """Drops what was written after `step`, where this run goes on from."""
    self._enabled = jax.process_index() == 0
    if not self._enabled:
      return
    kept = [line for line in read(workdir) if line["step"] <= step]
    write_whole(workdir / FILE,
                "".join(json.dumps(line) + "\n" for line in kept))
    self._file = (workdir / FILE).open("a")
    self._board = SummaryWriter(str(workdir / "tensorboard"),
                                purge_step=step + 1)

  def write(self, step: int, split: str, values: dict[str, Any]) -> None:
    """One JSON line; in TensorBoard one scalar each, `split/name`."""
    if not self._enabled:
      return
    self._file.write(json.dumps({"step": step, "split": split, **values})
                     + "\n")
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, list):
        for layer, x in enumerate(value):
          self._board.add_scalar(f"{split}/{name[:-2]}/layer_{layer}", x, step)
      else:
        self._board.add_scalar(f"{split}/{name}", value, step)

  def close(self) -> None:
    if self._enabled:
      self._file.close()
      self._board.close()
