"""Short tables for a terminal."""

import pathlib
from typing import Any

from sparse_lm import flops
from sparse_lm.config import Config, ModelConfig
from sparse_lm.decoding import Decoder, make_sampler, stream_text


def _flop_rows(model: ModelConfig, result: dict[str, Any]) -> list[str]:
  """FLOPs per token, dense-equivalent and executed, by part."""
  neurons = model.ffn.num_neurons
  seen = result["visible_keys_N"]
  dense = flops.dense_flops(model, seen)
  executed = flops.executed_flops(
      model, [f * neurons for f in result["active_fraction_N"]],
      result["attended_keys_N"], seen)
  rows = [f"{'MFLOP per token':<22}{'dense':>10}{'executed':>10}{'ratio':>8}"]
  for name in ("ffn", "projections", "attention", "logits", "total"):
    a, b = getattr(dense, name) / 1e6, getattr(executed, name) / 1e6
    rows.append(f"  {name:<20}{a:>10.3f}{b:>10.3f}{a / b:>7.2f}x")
  return rows


def summary_table(model: ModelConfig, result: dict[str, Any]) -> str:
  """Loss, sparsity per layer, FLOPs.

  Args:
    model: the model's config.
    result: from `training.metrics.summarize`, or from `evaluate`, which names
      the split.
  """
  loss_of = f"{result.get('split', 'validation')} loss"
  rows = [
      f"{loss_of:<22}{result['loss']:>10.4f} nats per token",
      f"{'perplexity':<22}{result['perplexity']:>10.2f}",
      f"{'bits per byte':<22}{result['bits_per_byte']:>10.4f}",
      "",
      f"{'layer':<8}{'active neurons':>16}{'of':>8}{'keys attended':>16}"
      f"{'of visible':>12}",
  ]
  per_layer = zip(result["active_fraction_N"], result["attended_keys_N"],
                  result["visible_keys_N"])
  for layer, (active, attended, seen) in enumerate(per_layer):
    rows.append(f"{layer:<8}{active:>15.2%}{model.ffn.num_neurons:>9,}"
                f"{attended:>16.1f}{seen:>12.1f}")
  rows.append(f"{'mean':<8}{result['active_fraction']:>15.2%}{'':>9}"
              f"{result['attended_keys']:>16.1f}{result['visible_keys']:>12.1f}")
  return "\n".join([*rows, "", *_flop_rows(model, result)])


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
