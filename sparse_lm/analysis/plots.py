"""Plots of a run, from its metrics.jsonl."""

import pathlib
from typing import Any

import matplotlib
from matplotlib.figure import Figure
import numpy as np

from sparse_lm.training import metrics
from sparse_lm.training.workdir import read_config


def _read(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Metric lines by split."""
  lines = {"train": [], "eval": []}
  for line in metrics.read(workdir):
    lines[line["split"]].append(line)
  return lines


def _column(lines: list[dict[str, Any]], name: str) -> np.ndarray:
  return np.array([line[name] for line in lines])


def learning_curve(workdir: pathlib.Path) -> Figure:
  """Bits per byte of training and held-out text over the steps."""
  lines = _read(workdir)
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  for split, style, label in (("train", "-", "training"),
                              ("eval", "o-", "held out")):
    axes.plot(_column(lines[split], "step"),
              _column(lines[split], "bits_per_byte"), style, label=label)
  axes.set(xlabel="step", ylabel="bits per byte",
           title=f"{workdir.name}: learning curve")
  axes.grid(alpha=0.3)
  axes.legend()
  return figure


def sparsity(workdir: pathlib.Path) -> Figure:
  """Active neurons and keys attended per layer over training."""
  train = _read(workdir)["train"]
  model = read_config(workdir).model
  steps = _column(train, "step")
  active = 100 * _column(train, "active_fraction_N")
  attended = _column(train, "attended_keys_N")
  figure = Figure(figsize=(10, 4), layout="constrained")
  left, right = figure.subplots(1, 2)
  colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, active.shape[1]))
  for layer, color in enumerate(colors):
    left.plot(steps, active[:, layer], color=color, label=f"layer {layer}")
    right.plot(steps, attended[:, layer], color=color, label=f"layer {layer}")
  if model.ffn.sparsifier != "none":
    left.axhline(100 * model.ffn.active_fraction, color="gray", linestyle="--",
                 label="aim")
  if model.attention.shape == "spark":
    right.axhline(model.attention.top_k, color="gray", linestyle="--",
                  label="top-k")
  left.set(xlabel="step", ylabel="active neurons (%)", ylim=(0, None),
           title=f"{workdir.name}: active neurons")
  right.set(xlabel="step", ylabel="keys per query, mean over heads",
            ylim=(0, None), title="keys attended")
  for axes in (left, right):
    axes.grid(alpha=0.3)
  left.legend(fontsize="small")
  return figure


def plot_run(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Writes learning_curve.png and sparsity.png into the run's folder."""
  paths = []
  for draw in (learning_curve, sparsity):
    figure = draw(workdir)
    paths.append(workdir / f"{draw.__name__}.png")
    figure.savefig(paths[-1], dpi=120)
  return paths
