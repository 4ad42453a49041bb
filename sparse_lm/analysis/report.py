"""Short tables for a terminal."""

import pathlib
from typing import Any

from sparse_lm import flops
from sparse_lm.config import Config, ModelConfig
from sparse_lm.decoding import Decoder, make_sampler, stream_text


def _flop_rows(model: ModelConfig, result: dict[str, Any]) -> list[str]:
  """FLOPs per token, dense-equivalent and executed, by part."""
  dense = flops.dense_flops(model, result["visible_keys_N"])
  executed = flops.measured_flops(model, result)
  rows = [f"{'MFLOP per token':<22}{'dense':>10}{'executed':>10}{'ratio':>8}"]
  for name in ("ffn", "projections", "attention", "logits", "total"):
    a, b = getattr(dense, name) / 1e6, getattr(executed, name) / 1e6
    rows.append(f"  {name:<20}{a:>10.3f}{b:>10.3f}{a / b:>7.2f}x")
  return rows


def _layer_rows(model: ModelConfig, result: dict[str, Any]) -> list[str]:
  rows = [f"{'layer':<8}{'active neurons':>16}{'of':>8}{'keys attended':>16}"
          f"{'of visible':>12}"]
  per_layer = zip(result["active_fraction_N"], result["attended_keys_N"],
                  result["visible_keys_N"])
  for layer, (active, attended, seen) in enumerate(per_layer):
    rows.append(f"{layer:<8}{active:>15.2%}{model.ffn.num_neurons:>9,}"
                f"{attended:>16.1f}{seen:>12.1f}")
  return [*rows, f"{'mean':<8}{result['active_fraction']:>15.2%}{'':>9}"
          f"{result['attended_keys']:>16.1f}{result['visible_keys']:>12.1f}"]


# Column heads of what `summarize` calls these.
DEFINITIONS = {
    "positive_fraction": "gate > 0",
    "hidden_fraction": "h != 0",
    "kept_fraction": "top-k keeps",
    "dead_fraction": "never fire",
    "union_8_fraction": "union of 8",
    "union_32_fraction": "union of 32",
}


def _definition_rows(result: dict[str, Any]) -> list[str]:
  """The active fraction by each definition, dead neurons, unions."""
  columns = {head: [*result[f"{name}_N"], result[name]]
             for name, head in DEFINITIONS.items()}
  rows = ["layer   " + "".join(f"{head:>13}" for head in columns)]
  labels = [*range(len(result["active_fraction_N"])), "mean"]
  for label, values in zip(labels, zip(*columns.values())):
    rows.append(f"{label:<8}" + "".join(f"{x:>13.2%}" for x in values))
  return rows


def summary_table(model: ModelConfig, result: dict[str, Any]) -> str:
  """Loss, sparsity per layer, FLOPs.

  Args:
    model: the model's config.
    result: of an evaluation, from `training.metrics.summarize`, or from
      `evaluate`, which names the split.
  """
  loss_of = f"{result.get('split', 'validation')} loss"
  return "\n".join([
      f"{loss_of:<22}{result['loss']:>10.4f} nats per token",
      f"{'perplexity':<22}{result['perplexity']:>10.2f}",
      f"{'bits per byte':<22}{result['bits_per_byte']:>10.4f}",
      "", *_layer_rows(model, result), "", *_definition_rows(result),
      "", *_flop_rows(model, result)])


def completion(config: Config, params: Any, tokenizer) -> str:
  """The config's prompt, completed, between rules."""
  sample = config.sample
  text = "".join(stream_text(
      Decoder(config.model, params), tokenizer, sample.prompt,
      sample.max_new_tokens, make_sampler(sample.temperature),
      config.training.seed))
  rule = "-" * 72
  return f"a completion of {sample.prompt!r}:\n{rule}\n{sample.prompt}{text}\n{rule}"


def file_list(workdir: pathlib.Path) -> str:
  """What a run left behind, and what each is for."""
  files = {
      "metrics.jsonl": "every number, a JSON object a line",
      "tensorboard": "the same for TensorBoard",
      "config.json": "the whole config",
      "tokenizer.json": "the tokenizer",
      "checkpoints": "the newest and the best",
      "learning_curve.png": "loss over training",
      "sparsity.png": "active neurons and keys attended, per layer",
  }
  return "\n".join(f"{str(workdir / name):<40} {text}"
                   for name, text in files.items())
