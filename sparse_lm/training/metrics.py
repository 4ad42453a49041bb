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
from sparse_lm.model.transformer import Statistics
from sparse_lm.training.step import Sums
from sparse_lm.training.workdir import write_whole

FILE = "metrics.jsonl"


def text_bytes(model: ModelConfig, tokenizer) -> np.ndarray:
  """Bytes of text per token id (V,), float32; 0 for ids that pad the model's."""
  table_V = np.zeros(model.vocab_size, np.float32)
  known = tokenizer.token_bytes_V
  table_V[:len(known)] = known
  return table_V


# Measures (see model/activity.py) that are fractions of the F neurons.
_FRACTIONS = {
    "active_neurons": "active_fraction",
    "positive_gates": "positive_fraction",
    "nonzero_hidden": "hidden_fraction",
    "kept_gates": "kept_fraction",
    "union_8": "union_8_fraction",
    "union_32": "union_32_fraction",
}


def _per_layer(stats: Statistics, num_neurons: int) -> dict[str, np.ndarray]:
  """Means over tokens (N,), fractions of the neurons where they count them."""
  means = {}
  for name, sums in stats.sums.items():
    if name == "fired":
      means["dead_fraction"] = (sums == 0).mean(-1)
    elif name in _FRACTIONS:
      means[_FRACTIONS[name]] = sums / stats.tokens / num_neurons
    else:
      means[name] = sums / stats.tokens
  return means


def summarize(sums: Sums, model: ModelConfig) -> dict[str, Any]:
  """Means over tokens from sums; per-layer lists have names that end in _N.

  Args:
    sums: on the host.
    model: gives the number of neurons.

  Returns:
    loss (nats per token), perplexity, bits_per_byte, z_loss, and for each of
    these its mean over layers and, with _N, the list of the layers:
    active_fraction (of the neurons, non-zero activation), hidden_fraction
    (non-zero intermediate output), attended_keys and visible_keys (per query,
    mean over heads), and what else was measured: positive_fraction,
    kept_fraction, dead_fraction (never fired), union_8_fraction,
    union_32_fraction, l1, adjacent, chunk_<n>.
  """
  loss = float(sums.loss / sums.tokens)
  summary = {
      "loss": loss,
      "perplexity": math.exp(min(loss, 700)),
      "bits_per_byte": float(sums.loss / math.log(2) / sums.text_bytes),
      "z_loss": float(sums.z_loss / sums.tokens),
  }
  layers = _per_layer(sums.statistics, model.ffn.num_neurons)
  summary |= {name: float(x_N.mean()) for name, x_N in layers.items()}
  summary |= {f"{name}_N": x_N.tolist() for name, x_N in layers.items()}
  return summary


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
