"""A suite's results as Markdown tables and as a figure."""

import json
import pathlib
from typing import Any

import matplotlib
from matplotlib.figure import Figure
import numpy as np

from sparse_lm.analysis.report import DEFINITIONS
from sparse_lm.training.workdir import write_whole

Results = dict[str, Any]  # as training.suite.collect returns them


def finished(results: Results) -> list[dict[str, Any]]:
  """The methods with at least one run."""
  return [method for method in results["methods"] if method["runs"]]


def _mean(method: dict[str, Any], *keys: str) -> float:
  values = []
  for value in method["runs"].values():
    for key in keys:
      value = value[key]
    values.append(value)
  return float(np.mean(values))


def gap(method: dict[str, Any], base: dict[str, Any]) -> float | None:
  """How much higher a method's loss is, mean over the seeds that both have."""
  seeds = method["runs"].keys() & base["runs"].keys()
  differences = [method["runs"][seed]["loss"] - base["runs"][seed]["loss"]
                 for seed in seeds]
  return float(np.mean(differences)) if differences else None


def loss_spread(results: Results) -> float | None:
  """The largest difference in loss between two seeds of one method, in nats.

  None where no method has two.
  """
  spreads = [np.ptp([run["loss"] for run in method["runs"].values()])
             for method in finished(results) if len(method["runs"]) > 1]
  return float(max(spreads)) if spreads else None


def _table(rows: list[list[str]]) -> str:
  """Markdown; the first row is the head, columns but the first are numbers."""
  rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
  return "\n".join(f"| {' | '.join(row)} |" for row in
                   [rows[0], rule, *rows[1:]])


def loss_table(results: Results) -> str:
  """Loss, its gap to the first method, active neurons, FLOPs, speed.

  A gap is over the seeds that both have; one within the spread between seeds is
  marked with ~.
  """
  methods = finished(results)
  base_flops = _mean(methods[0], "dense_flops", "total")
  spread = loss_spread(results) or 0.0
  rows = [["method", "loss (nats/token)", "gap", "bits/byte", "seeds",
           "h != 0", "keys attended", "MFLOP/token", "of dense",
           "trained at, tokens/s", "training, s"]]
  for method in methods:
    executed = _mean(method, "executed_flops", "total")
    speed = _mean(method, "tokens_per_second")
    trained = ([f"{speed:,.0f}", f"{_mean(method, 'training_seconds'):.0f}"]
               if speed else ["", ""])
    rows.append([
        method["label"], f"{_mean(method, 'loss'):.3f}",
        _gap_cell(method, methods[0], spread),
        f"{_mean(method, 'bits_per_byte'):.3f}", ", ".join(method["runs"]),
        f"{_mean(method, 'hidden_fraction'):.1%}",
        f"{_mean(method, 'attended_keys'):.0f}", f"{executed / 1e6:.2f}",
        f"{executed / base_flops:.0%}", *trained])
  return _table(rows)


def _gap_cell(method: dict[str, Any], base: dict[str, Any],
              spread: float) -> str:
  value = gap(method, base)
  if method is base or value is None:
    return ""
  return f"{'~' if abs(value) <= spread else ''}{value:+.3f}"


def _kept_cell(method: dict[str, Any]) -> str:
  """What the top-k keeps: of the neurons, or of each linear map's input."""
  kept, inputs = _mean(method, "kept_fraction"), _mean(method, "inputs_kept")
  if inputs < 1:
    return f"{inputs:.0%} of inputs"
  return f"{kept:.1%}" if kept < 1 else ""


def definition_table(results: Results) -> str:
  """Active neurons by every definition, dead neurons and unions."""
  rows = [["method", *DEFINITIONS.values()]]
  for method in finished(results):
    rows.append([method["label"], *(
        _kept_cell(method) if name == "kept_fraction"
        else f"{_mean(method, name):.1%}" for name in DEFINITIONS)])
  return _table(rows)


def layer_table(results: Results) -> str:
  """The fraction of non-zero intermediate outputs in each layer."""
  methods = finished(results)
  layers = len(next(iter(methods[0]["runs"].values()))["hidden_fraction_N"])
  rows = [["method", *map(str, range(layers))]]
  for method in methods:
    per_layer = np.mean([run["hidden_fraction_N"]
                         for run in method["runs"].values()], axis=0)
    rows.append([method["label"], *(f"{x:.1%}" for x in per_layer)])
  return _table(rows)


def _size(method: dict[str, Any]) -> tuple[float, ...]:
  return tuple(_mean(method, key) for key in (
      "parameters", "non_embedding", "training_tokens"))


def _hardware(results: Results) -> str:
  """Every machine that the runs were on, and when."""
  found = {", ".join((on["device"], f"jax {on['jax']}", on["date"]))
           for method in finished(results)
           for on in (run["hardware"] for run in method["runs"].values())}
  return "; ".join(sorted(found))


def _repeated(methods: list[dict[str, Any]]) -> str:
  return "measured on " + ", ".join(
      method["label"] for method in methods if len(method["runs"]) > 1)


def _setting(results: Results) -> str:
  methods = finished(results)
  parameters, non_embedding, tokens = (x / 1e6 for x in _size(methods[0]))
  lines = [
      f"{_hardware(results)}. "
      f"{parameters:.2f}M parameters, {non_embedding:.2f}M without the "
      f"embedding; {tokens:.2f}M training tokens; losses on the validation "
      "split."]
  others = [m["label"] for m in methods if _size(m) != _size(methods[0])]
  if others:
    lines.append(f"Of another size or number of tokens: {', '.join(others)}.")
  spread = loss_spread(results)
  lines.append(
      "One seed each: nothing here says how much of a gap is chance."
      if spread is None else
      f"Two seeds of one method differ by up to {spread:.3f} nats "
      f"({_repeated(methods)}): a gap to {methods[0]['label']}, over the seeds "
      "that both have, within that is marked ~, and the order of two methods "
      "that close is undecided.")
  missing = [m["label"] for m in results["methods"] if not m["runs"]]
  if missing:
    lines.append(f"Not trained: {', '.join(missing)}.")
  return "\n".join(lines)


def markdown(results: Results) -> str:
  """The whole comparison, as results/<suite>.md has it."""
  return f"""# {results['suite']}

{_setting(results)}

{loss_table(results)}

h != 0: neurons with a non-zero intermediate output. MFLOP/token: of a forward
pass that skips what is not active; training computes everything. Of dense: of
the first method's with nothing skipped.

![loss against executed FLOPs]({results['suite']}.png)

## Active neurons by each definition

{definition_table(results)}

gate > 0: activations above zero. h != 0: non-zero intermediate outputs. top-k
keeps: what the sparsifier lets through, empty where there is none. never fire:
on the evaluated tokens. union: neurons that fire for at least one of so many
adjacent tokens.

## Non-zero intermediate outputs by layer

{layer_table(results)}
"""


def figure(results: Results) -> Figure:
  """Loss against executed FLOPs per token, relative to the first method's loss
  and dense FLOPs.

  The main figure of the Spark paper (arXiv 2506.06644, Figure 1a). A run is
  relative to the first method's of the same seed. Seeds are joined by a line.
  """
  methods = finished(results)
  base = methods[0]["runs"]
  base_flops = _mean(methods[0], "dense_flops", "total")
  drawing = Figure(figsize=(10, 6), layout="constrained")
  axes = drawing.subplots()
  colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(methods)))
  for number, method in enumerate(methods):
    runs = {seed: run for seed, run in method["runs"].items() if seed in base}
    if not runs:
      continue
    x = [run["executed_flops"]["total"] / base_flops for run in runs.values()]
    y = [run["loss"] / base[seed]["loss"] for seed, run in runs.items()]
    axes.plot(x, y, "o-", color=colors[number],
              label=f"{number + 1}  {method['label']}")
    axes.annotate(str(number + 1), (np.mean(x), np.mean(y)), fontsize="small",
                  xytext=(4, 4), textcoords="offset points")
  axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
  axes.set(xlabel="executed FLOPs per token, relative to all of "
           f"{methods[0]['label']}'s", ylabel="validation loss, relative",
           title=f"{results['suite']} ({_hardware(results)})")
  axes.grid(alpha=0.3)
  drawing.legend(loc="outside right upper", fontsize="small")
  return drawing


def write(results: Results, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes <suite>.json, .md and .png; returns their paths.

  Without a finished run, the JSON file alone.
  """
  folder.mkdir(parents=True, exist_ok=True)
  stem = folder / results["suite"]
  paths = [stem.with_suffix(".json")]
  write_whole(paths[0], json.dumps(results, indent=1) + "\n")
  if finished(results):
    paths += [stem.with_suffix(".md"), stem.with_suffix(".png")]
    write_whole(paths[1], markdown(results))
    figure(results).savefig(paths[2], dpi=120)
  return paths
