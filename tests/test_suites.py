"""The shipped suites: fair, and, slowly, run from end to end."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from sparse_lm import config as config_lib
from sparse_lm.configs.suites import ffn_methods
from sparse_lm.training.step import init_params

ROOT = pathlib.Path(__file__).parents[1]


def parameters(config):
  return sum(x.size for x in jax.tree.leaves(
      jax.eval_shape(lambda: init_params(config))))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_methods_are_of_equal_parameters_and_tokens(size):
  suite = ffn_methods.get_suite(size)
  base = suite.methods[0].config
  assert suite.name == f"ffn_methods_{size}"
  for method in suite.methods:
    config = method.config
    assert parameters(config) == parameters(base), method.name
    steps = config.training.start_step + config.training.num_steps
    assert steps == base.training.num_steps, method.name
    assert bool(method.start) == (
        bool(config.training.start_from) and not method.shift)
    # Nothing but the method differs.
    differing = config_lib.differences(base, config)
    allowed = ("model.ffn.", "model.attention.shape", "model.linear_inputs.",
               "training.penalty.", "training.dead_neurons.")
    if config.training.start_from:
      allowed += ("training.",)
    assert all(key.startswith(allowed) for key in differing), differing


def test_the_small_size_is_what_it_says():
  config = ffn_methods.get_suite("small").methods[0].config
  embedding = config.model.vocab_size * config.model.model_dim
  assert 20e6 < parameters(config) - embedding < 60e6


def test_every_method_has_its_file():
  files = {path.stem for path in (ROOT / "configs" / "methods").glob("*.py")}
  named = set(ffn_methods.LABELS) - {"prosparse_shifted", "l1_controller_5",
                                     "l1_controller_1"} | {"l1_controller"}
  assert named == files - {"__init__", "base"}


@pytest.mark.slow
def test_the_tiny_suite_runs_from_end_to_end(tmp_path):
  """As a user would: the README's command, half an hour on 2 cores."""
  process = subprocess.run(
      [sys.executable, "-m", "sparse_lm.compare", "--suite=suites.ffn_methods",
       f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path}"],
      env=dict(os.environ, JAX_PLATFORMS="cpu"), capture_output=True, text=True,
      timeout=3 * 3600, check=False)
  assert process.returncode == 0, process.stderr[-4000:]
  results = json.loads((tmp_path / "ffn_methods_tiny.json").read_text())
  runs = {m["name"]: m["runs"]["0"] for m in results["methods"]}
  assert set(runs) == set(ffn_methods.LABELS)
  assert all(3 < run["loss"] < 6 for run in runs.values())
  assert runs["topk"]["kept_fraction"] == pytest.approx(41 / 512, rel=1e-3)
  assert runs["moc"]["kept_fraction"] == pytest.approx(0.25, rel=1e-3)
  for name, target in (("l1_controller_5", 0.05), ("l1_controller_1", 0.01)):
    assert runs[name]["hidden_fraction"] == pytest.approx(target, rel=0.5)
  assert (runs["prosparse_shifted"]["hidden_fraction"]
          <= runs["prosparse"]["hidden_fraction"]
          < runs["prosparse_relu"]["hidden_fraction"])
  assert runs["l1_locality"]["union_8_fraction"] < (
      runs["l1_controller_5"]["union_8_fraction"])
