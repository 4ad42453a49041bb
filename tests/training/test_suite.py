"""Suites: resumable, comparable, and what their results say."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from sparse_lm import config as config_lib
from sparse_lm import flops
from sparse_lm.analysis import comparison
from sparse_lm.data import pipeline
from sparse_lm.errors import UserError
from sparse_lm.training import (checkpoint, loop, metrics, suite as suite_lib,
                                workdir)
from sparse_lm.training.suite import Method, Suite


@pytest.fixture(scope="module")
def suite(tiny_config):
  """Dense, ReLU that starts from it, and that shifted; 6 steps each."""
  dense = {"model.ffn.shape": "gated", "model.ffn.sparsifier": "none",
           "model.ffn.activation": "silu", "model.attention.shape": "dense",
           "training.num_steps": 6,
           "training.eval_every": 6, "training.checkpoint_every": 3}
  half = dense | {"model.ffn.activation": "relu", "training.start_step": 3,
                  "training.start_from": "dense", "training.num_steps": 3,
                  "training.eval_every": 3}
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
  results = suite_lib.collect(suite, root)
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
  partial = suite_lib.collect(suite, tmp_path)
  assert [bool(m["runs"]) for m in partial["methods"]] == [True, False, False]
  monkeypatch.setattr(loop.StopSignal, "asked", asked)
  suite_lib.run(part, tmp_path, [0], lambda line: None)
  for name in ("dense", "relu"):
    a, b = (suite_lib.final_evaluation(suite_lib.folder(r, name, 0))
            for r in (root, tmp_path))
    assert a["loss"] == b["loss"], name


def test_a_continued_run_goes_on_with_the_data(suite, finished):
  """Its first batch is the one after those that its start was trained on."""
  root, lines = finished
  relu = workdir.read_config(root / "relu-seed0")
  assert any("the data go on from there" in line for line in lines)
  corpus = pipeline.open_corpus(relu)
  source = iter(corpus.train())
  for _ in range(relu.training.start_step):
    next(source)
  continued, fresh = iter(corpus.train()), iter(corpus.train())
  checkpoint.restore_data(root / "dense-seed0", relu.training.start_step,
                          continued)
  expected, again = next(source), next(fresh)
  np.testing.assert_array_equal(next(continued)["tokens_BxL"],
                                expected["tokens_BxL"])
  assert (again["tokens_BxL"] != expected["tokens_BxL"]).any()
  for iterator in (source, continued, fresh):
    iterator.close()


def test_what_others_start_from_is_kept(suite, tmp_path, monkeypatch):
  """Stopped after the step that another method starts from, then finished."""
  part, asked = suite.part(["relu"], lambda config: config_lib.replace(
      config, **{"training.keep_checkpoints": 1,
                 "training.checkpoint_every": 2})), loop.StopSignal.asked
  monkeypatch.setattr(loop.StopSignal, "asked",
                      lambda self, step: "SIGTERM" if step == 5 else "")
  with pytest.raises(loop.Stopped):
    suite_lib.run(part, tmp_path, [0], lambda line: None)
  monkeypatch.setattr(loop.StopSignal, "asked", asked)
  assert not suite_lib.run(part, tmp_path, [0], lambda line: None)
  assert checkpoint.is_saved(tmp_path / "dense-seed0", 3)
  assert not checkpoint.is_saved(tmp_path / "dense-seed0", 4)


def test_a_run_without_its_last_checkpoint_is_not_finished(suite, finished,
                                                           tmp_path):
  root, _ = finished
  shutil.copytree(root / "dense-seed1", tmp_path / "dense-seed1")
  assert suite_lib.final_evaluation(tmp_path / "dense-seed1")
  shutil.rmtree(tmp_path / "dense-seed1" / "checkpoints" / "6")
  assert suite_lib.final_evaluation(tmp_path / "dense-seed1") is None


def test_a_run_that_fails_does_not_keep_others_from_being_trained(
    suite, finished, tmp_path):
  root, _ = finished
  shutil.copytree(root / "dense-seed0", tmp_path / "dense-seed0")
  source = tmp_path / "dense-seed0" / "checkpoints" / "3" / "params"
  shutil.rmtree(source)
  failed = suite_lib.run(suite, tmp_path, [0], lambda line: None)
  assert len(failed) == 2
  assert failed[0].startswith("ReLU half way, seed 0: config.training.start_")
  assert failed[1].startswith("shifted, seed 0: --workdir=")


def test_what_cannot_work_is_refused_before_any_training(suite, tmp_path):
  wide = config_lib.replace(suite.methods[1].config,
                            **{"model.ffn.num_neurons": 96})
  methods = (suite.methods[0], dataclasses.replace(suite.methods[1],
                                                   config=wide))
  with pytest.raises(UserError, match="start_from: dense has blocks.ffn"):
    suite_lib.run(dataclasses.replace(suite, methods=methods), tmp_path, [0],
                  lambda line: None)
  assert not list(tmp_path.glob("*/config.json"))
  with pytest.raises(UserError, match="num_steps: cannot be overridden, since "
                     "relu starts"):
    suite.part([], lambda config: config_lib.replace(
        config, **{"training.num_steps": 9}))


def test_one_process_trains_in_a_folder(suite, tmp_path):
  config = suite.methods[0].config
  workdir.check(tmp_path, config)
  with workdir.locked(tmp_path):
    with pytest.raises(UserError, match="another process is training there"):
      loop.train(config, tmp_path, lambda line: None)


def test_other_thresholds_are_another_comparison(suite, finished):
  root, _ = finished
  other = dataclasses.replace(suite, thresholds=(0.3,))
  with pytest.raises(UserError, match="was made with other thresholds"):
    suite_lib.run(other, root, [0], lambda line: None)


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
  results = suite_lib.collect(suite, root)
  paths = comparison.write(results, tmp_path / "results")
  assert [path.name for path in paths] == ["mini.json", "mini.md", "mini.png"]
  text = paths[1].read_text()
  for part in ("| SwiGLU |", "union of 8", "never fire", "seeds of one method "
               "differ by up to", "measured on SwiGLU", "ReLU half way"):
    assert part in text
  assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_without_a_finished_run_there_is_a_file_and_no_table(suite, tmp_path):
  results = suite_lib.collect(suite, tmp_path / "nothing")
  paths = comparison.write(results, tmp_path)
  assert [path.name for path in paths] == ["mini.json"]
