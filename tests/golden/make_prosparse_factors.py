"""Makes prosparse_factors.json: Algorithm 1 of ProSparse, step by step.

  python tests/golden/make_prosparse_factors.py

Plain Python in float64, from the paper alone (arXiv 2402.13516, Appendix B,
and the table of hyper-parameters in the appendix): it walks through all steps
of the three published lists and keeps the factor at each stage's last step, at
the step after it, and after a quarter and a half of each stage.
"""

import json
import math
import pathlib

# A row a stage: the regularization factor, the accumulated steps. Stage 0 is
# the continual training with ReLU alone, before Algorithm 1 begins.
STAGES = {
    "llama2_7b": [(0.0, 5000), (0.005, 6000), (0.05, 10000), (0.05, 12000),
                  (0.2, 16000), (0.2, 16500)],
    "llama2_13b": [(0.0, 5500), (0.005, 6750), (0.01, 10750), (0.01, 11000),
                   (0.02, 15000), (0.02, 16000)],
    "minicpm_1b": [(0.0, 10000), (0.001, 15000), (0.005, 20000),
                   (0.005, 25000), (0.05, 35000), (0.05, 95000)],
}


def factors(stages):
  """The factor at every step, by its number, the first of which is 1."""
  (substitution, last), *regularized = stages
  at = dict.fromkeys(range(1, last + 1), substitution)
  step, peak_before = last, None
  for stage, (peak, last) in enumerate(regularized, start=1):
    first = step
    while step < last:
      step += 1
      if stage == 1:  # The warm-up has a constant factor.
        at[step] = peak
      else:
        angle = -math.pi / 2 + math.pi * (step - first) / (last - first)
        eta = 0.5 * (math.sin(angle) + 1)
        at[step] = peak_before + eta * (peak - peak_before)
    peak_before = peak
  return at


def main():
  golden = {}
  for name, stages in STAGES.items():
    at = factors(stages)
    kept, before = {1}, 0
    for _, last in stages:
      kept |= {(3 * before + last) // 4, (before + last) // 2, last, last + 1}
      before = last
    golden[name] = {
        "peaks": [peak for peak, _ in stages],
        "boundaries": [last for _, last in stages],
        "factors": [[step, at[step]] for step in sorted(kept) if step in at],
    }
  path = pathlib.Path(__file__).with_name("prosparse_factors.json")
  path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
  main()
