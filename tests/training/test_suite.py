"""Suites: resumable, comparable, and what their results say."""

import dataclasses
import json

import pytest

from sparse_lm import config as config_lib
from sparse_lm import flops
from sparse_lm.analysis import comparison
from sparse_lm.errors import UserError
from sparse_lm.training import loop, metrics, suite as suite_lib, workdir
from sparse_lm.training.suite import Method, Suite


@pytest.fixture(scope="module")
def suite(tiny_config):
  """Dense, ReLU that starts from it, and that shifted; 6 steps each."""
  dense = {"model.ffn.shape": "gated", "model.ffn.sparsifier": "none",
           "model.ffn.activation": "silu", "model.attention.shape": "dense",
           "training.num_steps": 6,
           "training.eval_every": 6, "training.checkpoint_every": 3}
  half = dense | {"model.ffn.activation": "relu", "training.start_step": 3,
                  "training.num_steps": 3, "training.eval_every": 3}
  return Suite("mini", (
      Method("dense", "SwiGLU", tiny_config(**dense)),
      Method("relu", "ReLU half way", tiny_config(**half), start="dense"),
      Method("shifted", "shifted", tiny_config(**half), shift="relu"),
  ), thresholds=(0.05, 1e6), tolerance=0.01)


def same(config):
  return config


@pytest.fixture(scope="module")
def finished(suite, tmp_path_factory):
  """The suite's runs, of `dense` with two seeds, and what was reported."""
  root, lines = tmp_path_factory.mktemp("suite"), []
  suite_lib.run(suite, root, [0], lines.append)
  suite_lib.run(suite.part(["dense"], same), root, [1], lines.append)
  return root, lines


def test_the_runs_are_those_of_the_configs(suite, finished):
  root, lines = finished
  assert workdir.read_config(root / "dense-seed1").training.seed == 1
  relu = workdir.read_config(root / "relu-seed0")
  assert relu.training.start_from == str(root / "dense-seed0")
  shifted = workdir.read_config(root / "shifted-seed0").model.ffn
  assert shifted.activation == "fatrelu" and shifted.threshold in (0, 0.05)
  assert any("starting from" in line and "step 3" in line for line in lines)


def test_results(suite, finished):
  root, _ = finished
  results = suite_lib.collect(suite, root, [0, 1])
  assert json.loads(json.dumps(results)) == results
  dense, relu, shifted = results["methods"]
  assert dense["changes"] == {} and set(dense["runs"]) == {"0", "1"}
  assert set(relu["runs"]) == set(shifted["runs"]) == {"0"}
  assert relu["changes"]["model.ffn.activation"] == "relu"
  run = relu["runs"]["0"]
  line = [x for x in metrics.read(root / "relu-seed0") if x["split"] == "eval"]
  assert run["loss"] == line[-1]["loss"]
  # Tokens of the dense half and its own.
  assert run["training_tokens"] == 6 * 8 * 32
  assert dense["runs"]["0"]["training_tokens"] == run["training_tokens"]
  assert shifted["runs"]["0"]["training_tokens"] == run["training_tokens"]
  everything = dense["runs"]["0"]["dense_flops"]
  assert dense["runs"]["0"]["executed_flops"] == pytest.approx(everything)
  model = suite.methods[0].config.model
  assert everything["total"] == pytest.approx(flops.dense_flops(
      model, dense["runs"]["0"]["visible_keys_N"]).total)
  assert run["executed_flops"]["ffn"] < 0.9 * everything["ffn"]
  assert run["parameters"] == run["non_embedding"] + 257 * 32


def test_a_finished_suite_trains_nothing(suite, finished):
  root, _ = finished
  lines = []
  suite_lib.run(suite, root, [0], lines.append)
  assert not lines


def test_stopped_anywhere_it_ends_the_same(suite, finished, tmp_path,
                                           monkeypatch):
  """Stopped inside the second method, and started again."""
  root, _ = finished
  part, asked = suite.part(["relu"], same), loop.StopSignal.asked

  def stop(self, step):
    return "SIGTERM" if step == 2 and len(list(tmp_path.iterdir())) == 2 else (
        asked(self, step))

  monkeypatch.setattr(loop.StopSignal, "asked", stop)
  with pytest.raises(loop.Stopped):
    suite_lib.run(part, tmp_path, [0], lambda line: None)
  partial = suite_lib.collect(suite, tmp_path, [0])
  assert [bool(m["runs"]) for m in partial["methods"]] == [True, False, False]
  monkeypatch.setattr(loop.StopSignal, "asked", asked)
  suite_lib.run(part, tmp_path, [0], lambda line: None)
  for name in ("dense", "relu"):
    a, b = (suite_lib.final_evaluation(suite_lib.folder(r, name, 0))
            for r in (root, tmp_path))
    assert a["loss"] == b["loss"], name


def test_other_configs_in_the_same_workdir_are_refused(suite, finished):
  root, _ = finished
  part = suite.part(["dense"], lambda config: config_lib.replace(
      config, **{"training.batch_size": 4}))
  with pytest.raises(UserError, match="another config.*batch_size"):
    suite_lib.run(part, root, [0], lambda line: None)


def test_parts_bring_what_they_need(suite):
  assert [m.name for m in suite.part(["shifted"], same).methods] == [
      "dense", "relu", "shifted"]
  assert [m.name for m in suite.part(["dense"], same).methods] == ["dense"]
  assert suite.part([], same) == suite
  with pytest.raises(UserError, match="--only: 'dens' is not one of dense, "):
    suite.part(["dens"], same)


def test_a_suite_out_of_order_is_refused(suite):
  with pytest.raises(UserError, match="relu needs dense, which does not stand"):
    dataclasses.replace(suite, methods=suite.methods[::-1][1:])
  with pytest.raises(UserError, match="dense is in it twice"):
    dataclasses.replace(suite, methods=suite.methods[:1] * 2)


def test_the_table_and_the_figure(suite, finished, tmp_path):
  root, _ = finished
  results = suite_lib.collect(suite, root, [0, 1])
  paths = comparison.write(results, tmp_path / "results")
  assert [path.name for path in paths] == ["mini.json", "mini.md", "mini.png"]
  text = paths[1].read_text()
  for part in ("| SwiGLU |", "union of 8", "never fire", "seeds of one method "
               "differ by up to", "ReLU half way"):
    assert part in text
  assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_without_a_finished_run_there_is_a_file_and_no_table(suite, tmp_path):
  results = suite_lib.collect(suite, tmp_path / "nothing", [0])
  paths = comparison.write(results, tmp_path)
  assert [path.name for path in paths] == ["mini.json"]
