"""Time sparse decoding against dense, on the device at hand.

  python -m sparse_lm.benchmark --suite=ffn
  python -m sparse_lm.benchmark --suite=decode --layers=8

ffn: one feed-forward layer at the shapes of Gemma-2 2B, for 1 and more tokens.
decode: whole models, configs/spark_2b.py against configs/gemma2_2b.py, with as
many layers as --layers says. Weights are random: what is measured is time, at
the active fraction that the sparsifier aims at. Beside each time stands the
least that reading the weights takes at the device's measured bandwidth.
"""

from collections.abc import Sequence
import json
import pathlib

from sparse_lm import cli
from sparse_lm.errors import UserError


def _numbers(flag: str, text: str) -> list[int]:
  try:
    values = [int(x) for x in text.split(",")]
  except ValueError:
    raise UserError(f"--{flag}={text}: is not a list such as 1,8") from None
  if min(values) < 1:
    raise UserError(f"--{flag}={text}: must be above 0")
  return values


def main(argv: Sequence[str]) -> None:
  parser = cli.Parser(__doc__, "benchmark")
  parser.add_argument("--suite", required=True, choices=("ffn", "decode"))
  parser.add_argument("--layers", type=int, default=4, help="distinct layers, "
                      "so that none stays in a cache (default: 4)")
  parser.add_argument("--tokens", default="1,2,4,8,32", help="ffn: tokens at a "
                      "time (default: 1,2,4,8,32)")
  parser.add_argument("--prompts", default="256,1024", help="decode: tokens in "
                      "the cache (default: 256,1024)")
  parser.add_argument("--output", type=pathlib.Path, metavar="FILE",
                      help="also write the rows there, as JSON")
  args = parser.parse_args(argv)
  if args.layers < 1:
    raise UserError(f"--layers={args.layers}: must be above 0")
  from sparse_lm.decoding import timing  # pylint: disable=g-import-not-at-top
  if args.suite == "ffn":
    result = timing.time_ffn(args.layers, _numbers("tokens", args.tokens))
  else:
    result = timing.time_decode(args.layers, _numbers("prompts", args.prompts))
  print(timing.table(result))
  if args.output:
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  cli.run(main)
