"""Starting from another run's parameters: what is taken, what is refused."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from sparse_lm.errors import UserError
from sparse_lm.training import loop, program

SCALES = {3: 2.0, 7: -3.0}  # of the source's parameters, by checkpoint


def silent(_):
  pass


@pytest.fixture(scope="module")
def make_config(tiny_config):
  """Tiny, its vocabulary padded so that meshes can split it."""
  return functools.partial(tiny_config, **{"model.vocab_size": 264})


def save(trainer, step, scale):
  """A checkpoint in which nothing is as it is in a fresh state."""
  state = jax.tree.map(lambda x: x + 1, trainer.state)
  params = jax.tree.map(lambda x: x * scale, trainer.state.params)
  trainer.checkpointer.save(dataclasses.replace(
      state, step=state.step - 1 + step, params=params), trainer.batches, None)
  trainer.checkpointer.wait()
  return params


@pytest.fixture(scope="module")
def source(make_config, tmp_path_factory):
  """A run's folder, and its parameters at its two checkpoints."""
  folder = tmp_path_factory.mktemp("source") / "run"
  folder.mkdir()
  trainer = loop.Trainer(make_config(), folder, silent)
  params = {step: jax.device_get(save(trainer, step, scale))
            for step, scale in SCALES.items()}
  trainer.close()
  return folder, params


def start(config, workdir):
  """The trainer of a run before its first step, and what it reported."""
  lines = []
  workdir.mkdir(exist_ok=True)
  return loop.Trainer(config, workdir, lines.append), lines


@pytest.mark.parametrize("chosen, step", [(0, 7), (3, 3)])
def test_a_run_starts_from_the_parameters_of_a_checkpoint(
    source, make_config, tmp_path, chosen, step):
  """And from a fresh optimizer, step and sparsity, with penalties of its own.

  The source has another activation, and a mesh of another shape; both may
  differ.
  """
  folder, params = source
  config = make_config(**{
      "training.start_from": str(folder), "training.start_step": chosen,
      "training.mesh.fsdp": 2, "model.ffn.activation": "relu",
      "training.penalty.schedule": "constant",
      "training.penalty.factor": 0.125})
  trainer, lines = start(config, tmp_path / "run")
  trainer.close()
  assert lines == [f"starting from {folder}, step {step}; the data go on from "
                   "there"]
  jax.tree.map(np.testing.assert_array_equal, trainer.state.params,
               params[step])
  fresh = program.create_state(config, trainer.mesh)
  assert trainer.step == 0 and trainer.state.sparsity.factor == 0.125
  jax.tree.map(np.testing.assert_array_equal, trainer.state,
               dataclasses.replace(fresh, params=trainer.state.params))
  jax.tree.map(assert_same_sharding, trainer.state, fresh)


@pytest.mark.parametrize("changes", [
    {"training.seed": 5}, {"training.batch_size": 16},
    {"data.shuffle_window": 9}])
def test_other_data_start_at_their_beginning(source, make_config, tmp_path,
                                             changes):
  config = make_config(**{"training.start_from": str(source[0]), **changes})
  trainer, lines = start(config, tmp_path / "run")
  first = next(trainer.batches)
  trainer.close()
  assert lines[0].endswith("others, these start at their beginning")
  fresh = iter(trainer.corpus.train())
  np.testing.assert_array_equal(first["tokens_BxL"],
                                next(fresh)["tokens_BxL"])
  fresh.close()


def assert_same_sharding(a, b):
  assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_resumed_run_does_not_start_over(source, make_config, tmp_path):
  """Nor does it need the source any more."""
  folder = tmp_path / "source"
  shutil.copytree(source[0], folder)
  config = make_config(**{"training.start_from": str(folder)})
  trainer, _ = start(config, tmp_path / "run")
  saved = jax.device_get(save(trainer, 4, 5.0))
  trainer.close()
  shutil.rmtree(folder)
  trainer, lines = start(config, tmp_path / "run")
  trainer.close()
  assert trainer.step == 4 and not lines
  jax.tree.map(np.testing.assert_array_equal, trainer.state.params, saved)


def refused(config, workdir, *parts):
  """One line with every part in it; no run is left, and nothing trained."""
  lines = []
  with pytest.raises(UserError) as error:
    loop.train(config, workdir, lines.append)
  assert "\n" not in str(error.value)
  for part in parts:
    assert part in str(error.value)
  for name in ("config.json", "tokenizer.json", "data.json", "metrics.jsonl"):
    assert not (workdir / name).exists()
  assert not [line for line in lines if line.startswith(("step", "compiled"))]
  # Nothing is left that a corrected start would trip over.
  assert not list((workdir / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("keys, parts", [
    ({"model.ffn.num_neurons": 128},
     ["blocks.ffn.down_FxD", "(2, 64, 32)", "(2, 128, 32)"]),
    ({"model.num_layers": 3}, ["(2, ", "(3, "]),
    ({"model.ffn.shape": "gated"}, ["blocks.ffn.gate_DxF"]),
    ({"model.ffn.shape": "plain"}, ["blocks.ffn.gate_DxF"]),
    ({"data.tokenizer": "bpe"}, ["another tokenizer"])])
def test_another_model_is_refused(source, make_config, tmp_path, keys, parts):
  config = make_config(**{"training.start_from": str(source[0]), **keys})
  refused(config, tmp_path / "run", "config.training.start_from",
          str(source[0]), *parts)


def test_no_run_to_start_from(source, make_config, tmp_path):
  def refuse(folder, *parts):
    refused(make_config(**{"training.start_from": str(folder)}),
            tmp_path / "run", "config.training.start_from", str(folder), *parts)

  refuse(tmp_path / "nowhere", "no run")
  refuse(tmp_path, "no run")
  refuse(tmp_path / "run", "no run")  # Itself.
  shutil.copytree(source[0], tmp_path / "unsaved")
  shutil.rmtree(tmp_path / "unsaved" / "checkpoints")
  refuse(tmp_path / "unsaved", "no checkpoint")
  (tmp_path / "unsaved" / "checkpoints").mkdir()
  refuse(tmp_path / "unsaved", "no checkpoint")


def test_no_such_step_to_start_from(source, make_config, tmp_path):
  refused(make_config(**{"training.start_from": str(source[0]),
                         "training.start_step": 5}),
          tmp_path / "run", "config.training.start_step", str(source[0]),
          "no checkpoint 5; it has 3, 7")


def test_a_damaged_step_to_start_from(source, make_config, tmp_path):
  folder = tmp_path / "source"
  shutil.copytree(source[0], folder)
  (folder / "checkpoints" / "7" / "params" / "_METADATA").write_text("")
  keys = {"training.start_from": str(folder)}
  refused(make_config(**keys, **{"training.start_step": 7}), tmp_path / "run",
          "config.training.start_step=7", "cannot be read")
  trainer, lines = start(make_config(**keys), tmp_path / "run")
  trainer.close()
  assert lines[0].startswith("warning: ") and lines[1:] == [
      f"starting from {folder}, step 3; the data go on from there"]
  assert (folder / "checkpoints" / "7").is_dir()  # It is not ours to move.
