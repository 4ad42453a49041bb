"""The comparison's tables, on results made by hand."""

import pytest

from sparse_lm.analysis import comparison


def run(loss, flops, **values):
  fractions = {name: 0.25 for name in comparison.DEFINITIONS}
  return {"loss": loss, "bits_per_byte": loss / 2, "attended_keys": 9.0,
          "executed_flops": {"total": flops}, "dense_flops": {"total": 4e6},
          "tokens_per_second": 100.0, "training_seconds": 60.0,
          "hidden_fraction_N": [0.1, 0.4], "parameters": 2e6,
          "hardware": {"device": "1 x X", "jax": "1.2", "date": "today"},
          "non_embedding": 1e6, "training_tokens": 3e6, **fractions,
          "kept_fraction": 1.0, "inputs_kept": 1.0, **values}


def make(**methods):
  return {"suite": "s", "methods": [
      {"name": name, "label": name, "changes": {},
       "runs": {str(seed): run for seed, run in enumerate(runs)}}
      for name, runs in methods.items()]}


def cells(table, label):
  row = next(line for line in table.splitlines()
             if line.startswith(f"| {label} |"))
  return [cell.strip() for cell in row.strip("|").split("|")]


RESULTS = make(
    dense=[run(3.0, 4e6), run(3.04, 4e6)],
    near=[run(3.03, 1e6, hidden_fraction=0.05)],
    far=[run(3.2, 2e6, training_tokens=9e6)],
    missing=[])


def test_means_gaps_and_the_mark_of_chance():
  table = comparison.loss_table(RESULTS)
  assert cells(table, "dense")[1:5] == ["3.020", "", "1.510", "0, 1"]
  # The two seeds of `dense` are 0.04 apart; the gap is to the same seed's.
  assert cells(table, "near")[1:6] == ["3.030", "~+0.030", "1.515", "0", "5.0%"]
  assert cells(table, "near")[7:9] == ["1.00", "25%"]
  assert cells(table, "far")[2] == "+0.200"
  assert "missing" not in table


def test_the_spread_is_the_largest_between_seeds_of_a_method():
  assert comparison.loss_spread(RESULTS) == pytest.approx(0.04)
  assert comparison.loss_spread(make(a=[run(3.0, 1)], b=[run(4, 1)])) is None


def test_what_cannot_be_compared_is_named():
  text = comparison.markdown(RESULTS)
  assert "Of another size or number of tokens: far." in text
  assert "Not trained: missing." in text
  assert "differ by up to 0.040 nats" in text
  alone = comparison.markdown(make(a=[run(3.0, 1)]))
  assert "1 x X, jax 1.2, today." in alone
  assert "One seed each" in alone and "Not trained" not in alone


def test_what_a_top_k_keeps_is_shown_where_there_is_one():
  results = make(none=[run(3.0, 1)], topk=[run(3.0, 1, kept_fraction=0.08)],
                 inputs=[run(3.0, 1, inputs_kept=0.6)])
  table = comparison.definition_table(results)
  column = list(comparison.DEFINITIONS).index("kept_fraction") + 1
  kept = [cells(table, name)[column] for name in ("none", "topk", "inputs")]
  assert kept == ["", "8.0%", "60% of inputs"]


def test_layers_are_means_over_seeds():
  results = make(a=[run(3.0, 1), run(3.0, 1, hidden_fraction_N=[0.3, 0.4])])
  assert cells(comparison.layer_table(results), "a") == ["a", "20.0%", "40.0%"]


def test_the_figure_is_relative_to_the_first_method():
  axes = comparison.figure(RESULTS).axes[0]
  lines = {line.get_label().split()[-1]: line for line in axes.get_lines()
           if line.get_label()[0].isdigit()}
  assert list(lines["near"].get_xdata()) == [0.25]
  assert list(lines["near"].get_ydata()) == pytest.approx([3.03 / 3.0])
  assert list(lines["dense"].get_xdata()) == [1, 1]
