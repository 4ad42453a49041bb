"""The shift from ReLU to FATReLU."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from sparse_lm.errors import UserError
from sparse_lm.training import (checkpoint, evaluation, loop, threshold,
                                workdir)

THRESHOLDS = (0.02, 0.1, 1e6)


def quiet(line):
  del line


def reglu(tiny_config, **changes):
  return tiny_config(**{
      "model.ffn.shape": "gated", "model.ffn.sparsifier": "none",
      "model.ffn.activation": "relu", "training.num_steps": 4,
      "training.eval_every": 4, **changes})


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("reglu")
  loop.train(reglu(tiny_config), folder, quiet)
  return folder


@pytest.fixture(scope="module")
def swept(trained, tmp_path_factory):
  output = tmp_path_factory.mktemp("shifted") / "run"
  return output, threshold.sweep(trained, output, THRESHOLDS, 0.05, None, quiet)


def test_thresholds_are_tried_and_the_largest_good_one_is_taken(swept):
  output, chosen = swept
  record = json.loads((output / threshold.FILE).read_text())
  rows = record["candidates"]
  assert [row["threshold"] for row in rows] == [0, *THRESHOLDS]
  active = [row["hidden_fraction"] for row in rows]
  assert active == sorted(active, reverse=True) and active[-1] == 0
  limit = 1.05 * rows[0]["perplexity"]
  good = [row["threshold"] for row in rows if row["perplexity"] <= limit]
  assert chosen["threshold"] == record["chosen"] == max(good)


def test_a_threshold_of_0_is_relu(trained, swept):
  output, _ = swept
  rows = json.loads((output / threshold.FILE).read_text())["candidates"]
  relu = evaluation.evaluate_run(trained, quiet)
  np.testing.assert_allclose(rows[0]["loss"], relu["loss"], rtol=1e-6)
  assert rows[0]["hidden_fraction"] == relu["hidden_fraction"]


def test_the_output_is_a_run_with_the_same_parameters(trained, swept):
  output, chosen = swept
  again = evaluation.evaluate_run(output, quiet)
  assert again["loss"] == pytest.approx(chosen["loss"], rel=1e-6)
  assert again["step"] == 4
  config = workdir.read_config(output)
  assert config.model.ffn.activation == "fatrelu"
  load = functools.partial(checkpoint.load_run_params, config=config,
                           report=quiet)
  jax.tree.map(np.testing.assert_array_equal, load(trained)[1], load(output)[1])


@pytest.mark.parametrize("tolerance, expected", [
    (0.0, 0.02), (0.05, 0.1), (9.0, 0.5)])
def test_choosing(tolerance, expected):
  rows = [dict(threshold=t, perplexity=p) for t, p in (
      (0.0, 100.0), (0.02, 99.0), (0.1, 105.0), (0.5, 900.0))]
  assert threshold.choose(rows, tolerance)["threshold"] == expected


def test_bad_input(trained, swept, tiny_config, tmp_path):
  output, _ = swept
  with pytest.raises(UserError, match="--output=.*exists already"):
    threshold.sweep(trained, output, THRESHOLDS, 0.05, None, quiet)
  with pytest.raises(UserError, match="holds no run"):
    threshold.sweep(tmp_path, tmp_path / "x", THRESHOLDS, 0.05, None, quiet)
  spark = tmp_path / "spark"
  workdir.check(spark, tiny_config())
  (spark / workdir.CONFIG).write_text(json.dumps(
      {"model": {"ffn": {"activation": "gelu"}}}))
  with pytest.raises(UserError, match="model.ffn.activation: only relu .* "
                     "this run has gelu"):
    threshold.sweep(spark, tmp_path / "x", THRESHOLDS, 0.05, None, quiet)


def test_a_shifted_run_is_shifted_from_where_it_is(swept, tmp_path):
  """Its own threshold is the baseline, and the smallest candidate."""
  output, chosen = swept
  again = threshold.sweep(output, tmp_path / "again", (0.0, 1e-3, 1e6), 0.05,
                          None, quiet)
  rows = json.loads((tmp_path / "again" / threshold.FILE).read_text())
  assert [row["threshold"] for row in rows["candidates"]] == [
      chosen["threshold"], 1e6]
  assert again["loss"] == pytest.approx(chosen["loss"], rel=1e-6)


def test_half_a_run_is_not_left(trained, tmp_path, monkeypatch):
  def fail(*unused):
    raise KeyboardInterrupt

  monkeypatch.setattr(threshold.workdir, "record", fail)
  with pytest.raises(KeyboardInterrupt):
    threshold.sweep(trained, tmp_path / "x", (), 0.05, None, quiet)
  assert not (tmp_path / "x").exists()
  monkeypatch.undo()
  assert threshold.sweep(trained, tmp_path / "x", (), 0.05, None, quiet)
  assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_unfinished_run_is_refused(trained, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(trained, copy)
  (copy / "checkpoints" / "4").rename(copy / "checkpoints" / "3")
  with pytest.raises(UserError, match="its run is not finished"):
    threshold.sweep(copy, tmp_path / "x", (), 0.05, None, quiet)


def test_a_loss_that_is_no_number_is_refused():
  with pytest.raises(UserError, match="not a finite number"):
    threshold.choose([dict(threshold=0.0, perplexity=float("nan"))], 0.1)


def test_no_validation_data(trained, tmp_path, monkeypatch):
  config = json.loads((trained / workdir.CONFIG).read_text())
  config["data"]["eval_split"] = "nowhere"
  read = workdir.config_lib.from_dict(config)
  monkeypatch.setattr(workdir, "read_config", lambda folder: read)
  with pytest.raises(UserError, match="config.data.eval_split: no split "
                     "'nowhere'"):
    threshold.sweep(trained, tmp_path / "x", THRESHOLDS, 0.05, None, quiet)
  assert not (tmp_path / "x").exists()
