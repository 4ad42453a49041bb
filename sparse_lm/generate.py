"""Complete a prompt with a trained model.

  python -m sparse_lm.generate --workdir=runs/spark_tiny --prompt='def main('

Reads config, tokenizer and parameters from the run's folder and prints the
text as it is drawn, until the document ends, the context is full or
--max_new_tokens are drawn.
"""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

from sparse_lm import cli
from sparse_lm.config import Config
from sparse_lm.decoding import Decoder, make_sampler, stream_text
from sparse_lm.errors import UserError


def load(folder: pathlib.Path, step: int | None = None
         ) -> tuple[Config, Any, Any, int]:
  """A run's config, parameters, tokenizer, and the checkpoint's step."""
  from sparse_lm.data import tokenizer as tokenizer_lib  # pylint: disable=g-import-not-at-top
  from sparse_lm.training import checkpoint, workdir  # pylint: disable=g-import-not-at-top
  config = workdir.read_config(folder)
  step, params = checkpoint.load_run_params(
      folder, config, lambda line: print(line, file=sys.stderr), step)
  return config, params, tokenizer_lib.load(folder / workdir.TOKENIZER), step


def read_prompt(flag: str) -> str:
  """The prompt, from standard input where the flag is a dash."""
  try:
    if flag == "-":
      return sys.stdin.buffer.read().decode()
    return flag.encode().decode()
  except UnicodeError as e:
    raise UserError("--prompt: is not UTF-8 text") from e


def main(argv: Sequence[str]) -> None:
  parser = cli.Parser(__doc__, "generate")
  cli.add_workdir_flag(parser, "the run's folder, as given to train")
  parser.add_argument("--prompt", default="", help="the text to go on from; - "
                      "reads it from standard input (default: empty, a new "
                      "document)")
  parser.add_argument("--max_new_tokens", type=int, default=128,
                      help="draw at most so many tokens (default: 128)")
  parser.add_argument("--temperature", type=float, default=0.8, help="0 always "
                      "takes the likeliest token; 1 draws from the model's "
                      "distribution (default: 0.8)")
  parser.add_argument("--top_k", type=int, default=0, help="draw from the k "
                      "likeliest tokens alone (default: 0, all)")
  parser.add_argument("--top_p", type=float, default=1.0, help="draw from the "
                      "likeliest tokens that hold this much probability "
                      "(default: 1, all)")
  parser.add_argument("--seed", type=int, default=0, help="of the draws "
                      "(default: 0)")
  parser.add_argument("--step", type=int, default=None, help="which checkpoint "
                      "(default: the newest)")
  parser.add_argument("--ffn_implementation", default=None, help="which kernel "
                      "reads active neurons (default: the fastest here)")
  parser.add_argument("--json", action="store_true",
                      help="print one JSON object when done, no stream")
  args = parser.parse_args(argv)
  sampler = make_sampler(args.temperature, args.top_k, args.top_p)
  if not 0 <= args.seed < 2**63:
    raise UserError(f"--seed={args.seed}: is not in [0, 2^63)")
  prompt = read_prompt(args.prompt)
  config, params, tokenizer, step = load(args.workdir, args.step)
  decoder = Decoder(config.model, params,
                    ffn_implementation=args.ffn_implementation)
  pieces = stream_text(decoder, tokenizer, prompt, args.max_new_tokens,
                       sampler, args.seed)
  if args.json:
    print(json.dumps(dict(
        prompt=prompt, completion="".join(pieces), step=step,
        ffn_implementations=decoder.ffn_implementations,
        attention_implementations=decoder.attention_implementations,
        **decoder.sparsity())))
    return
  first = next(pieces)  # Refuses a prompt that does not fit.
  print(prompt + first, end="", flush=True)
  for piece in pieces:
    print(piece, end="", flush=True)
  print()


if __name__ == "__main__":
  cli.run(main)
