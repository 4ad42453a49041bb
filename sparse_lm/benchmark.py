"""Time sparse decoding and training against dense, on the device at hand.

  python -m sparse_lm.benchmark --suite=ffn
  python -m sparse_lm.benchmark --suite=decode --layers=8
  python -m sparse_lm.benchmark --suite=attention_training
  python -m sparse_lm.benchmark --suite=topk_training

ffn: one feed-forward layer at the shapes of Gemma-2 2B, for 1 and more tokens,
Spark's against the dense one, XLA's and PyTorch's where that is installed.
relu_ffn: the same of a gated layer with no predictor, 1% of its neurons active.
decode: whole models, configs/spark_2b.py against configs/gemma2_2b.py, with as
many layers as --layers says. Weights are random: what is measured is time, at
the active fraction that the sparsifier aims at. Beside each time stands the
least that reading the weights takes at the device's measured bandwidth.
attention_training: causal attention of one sequence, 8 query and 4 key/value
heads of 256, forward and with its backward pass, and its temporaries.
topk_training: Spark's feed-forward layer, forward and backward, with no top-k
and with several; gated_*: statistical top-k, activation and product as one.
"""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

from sparse_lm import cli
from sparse_lm.errors import UserError


def _numbers(flag: str, text: str, example: str = "1,8", separator: str = ",",
             count: int = 0) -> list[int]:
  """The numbers of a flag, `count` of them unless that is 0."""
  try:
    values = [int(x) for x in text.split(separator)]
  except ValueError:
    values = []
  if not values or len(values) != (count or len(values)):
    raise UserError(f"--{flag}={text}: is not a list such as {example}")
  if min(values) < 1:
    raise UserError(f"--{flag}={text}: must be above 0")
  return values


def _table(result: dict[str, Any]) -> str:
  """What a suite measured, for a terminal."""
  title = (f"{result['suite']} on {result['device']}, {result['dtype']}, jax "
           f"{result['jax']}")
  if "gigabytes_per_second" in result:
    title += f", {result['gigabytes_per_second']:.1f} GB/s read"
  heads = list(result["rows"][0])
  lines = [heads] + [
      [f"{row[head]:.3f}" if isinstance(row[head], float) else str(row[head])
       for head in heads] for row in result["rows"]]
  widths = [2 + max(map(len, column)) for column in zip(*lines)]
  return "\n".join([title] + [
      "".join(cell.rjust(width) for cell, width in zip(line, widths))
      for line in lines])


def _read_scores(args, tokens: int):
  """--scores's array; None without it."""
  import numpy as np  # pylint: disable=g-import-not-at-top
  if args.scores is None:
    return None
  if args.suite != "ffn":
    raise UserError(f"--scores={args.scores}: is for --suite=ffn alone")
  try:
    scores = np.lib.format.open_memmap(args.scores, mode="r")
  except (OSError, ValueError) as e:
    raise UserError(f"--scores={args.scores}: {e}") from e
  if scores.ndim != 3 or scores.shape[1] < tokens:
    raise UserError(f"--scores={args.scores}: has shape {scores.shape}, not "
                    f"layers, {tokens} tokens or more, neurons")
  return scores


def _log(line: str) -> None:
  """Shows what has been timed, a line at a time: a suite takes minutes."""
  print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
  parser = cli.Parser(__doc__, "benchmark")
  parser.add_argument("--suite", required=True, choices=(
      "ffn", "relu_ffn", "decode", "attention_training", "topk_training"))
  parser.add_argument("--layers", type=int, default=4, help="distinct layers, "
                      "so that none stays in a cache (default: 4)")
  parser.add_argument("--tokens", default="1,2,4,8,32", help="ffn, relu_ffn: "
                      "tokens at a time (default: 1,2,4,8,32)")
  parser.add_argument("--scores", type=pathlib.Path, metavar="FILE.npy",
                      help="ffn: scores that say which neurons are active, as "
                      "evaluate --scores writes them (default: random weights)")
  parser.add_argument("--prompts", default="256,1024", help="decode: tokens in "
                      "the cache (default: 256,1024)")
  parser.add_argument("--lengths", default="2048,8192", help="attention_"
                      "training: tokens of a sequence (default: 2048,8192)")
  parser.add_argument("--blocks", default="512x512,512x1024,1024x1024",
                      help="attention_training: queries x keys of blocks "
                      "(default: 512x512,512x1024,1024x1024)")
  parser.add_argument("--shape", default="8192,2304,13824,1024",
                      help="topk_training: tokens, model dim, neurons, "
                      "predictor dim (default: 8192,2304,13824,1024)")
  parser.add_argument("--output", type=pathlib.Path, metavar="FILE",
                      help="also write the rows there, as JSON")
  args = parser.parse_args(argv)
  if args.layers < 1:
    raise UserError(f"--layers={args.layers}: must be above 0")
  if args.output and not args.output.parent.is_dir():
    raise UserError(f"--output={args.output}: {args.output.parent} is not a "
                    "folder")
  tokens = _numbers("tokens", args.tokens)
  scores = _read_scores(args, max(tokens))
  # pylint: disable=g-import-not-at-top
  if args.suite.endswith("_training"):
    from sparse_lm.training import timing
  else:
    from sparse_lm.decoding import timing
  if args.suite == "attention_training":
    blocks = [tuple(_numbers("blocks", pair, "512x512,512x1024", "x", 2))
              for pair in args.blocks.split(",")]
    result = timing.time_attention(_numbers("lengths", args.lengths), blocks)
  elif args.suite == "topk_training":
    shape = _numbers("shape", args.shape, "64,48,256,16", count=4)
    if shape[3] >= shape[1]:
      raise UserError(f"--shape={args.shape}: the predictor dim {shape[3]} "
                      f"must be below the model dim {shape[1]}")
    result = timing.time_topk(*shape)
  elif args.suite.endswith("ffn"):
    result = timing.time_ffn(args.suite, args.layers, tokens, _log, scores)
  else:
    result = timing.time_decode(args.layers, _numbers("prompts", args.prompts),
                                _log)
  print(_table(result))
  if args.output:
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  cli.run(main)
