"""Checkpoints: which are kept, damage, other meshes."""

import functools
import pathlib
import shutil

import grain
import jax
import numpy as np
import optax
import pytest

from sparse_lm.errors import UserError
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training.checkpoint import Checkpointer, load_run_params
from sparse_lm.training.sparsity import SparsityState
from sparse_lm.training.step import TrainState, init_state

ADAM = optax.adam(1e-3)


def iterator(position=0):
  it = iter(grain.MapDataset.range(1000).to_iter_dataset())
  for _ in range(position):
    next(it)
  return it


@pytest.fixture(scope="module")
def state(tiny_config):
  return jax.jit(functools.partial(init_state, tiny_config(), ADAM))()


def at(state, step):
  """The state at a step, with a factor and idle counts of its own."""
  idle_NxF = state.sparsity.idle_NxF
  idle_NxF = step + jax.numpy.arange(idle_NxF.size).reshape(idle_NxF.shape)
  return TrainState(jax.numpy.int32(step), state.params, state.optimizer,
                    SparsityState(jax.numpy.float32(step / 8), idle_NxF))


def save(workdir, state, steps, keep=2, losses=()):
  checkpointer = Checkpointer(workdir, keep)
  losses = dict(zip(steps, losses))
  for step in steps:
    checkpointer.save(at(state, step), iterator(step), losses.get(step))
  checkpointer.wait()
  checkpointer.close()


def restore(workdir, state):
  """Step, state, data position, what was reported."""
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state)
  checkpointer, it, lines = Checkpointer(workdir, 2), iterator(), []
  restored = checkpointer.restore(abstract, it, lines.append)
  checkpointer.close()
  return restored, restored and next(it), lines


def test_round_trip(tmp_path, state):
  save(tmp_path, state, [7])
  restored, position, lines = restore(tmp_path, state)
  assert restored.step == 7 and position == 7 and not lines
  assert restored.sparsity.factor == 7 / 8
  jax.tree.map(np.testing.assert_array_equal, restored, at(state, 7))


def test_no_checkpoint_is_none(tmp_path, state):
  assert restore(tmp_path, state)[0] is None


def test_the_newest_and_the_best_are_kept(tmp_path, state):
  save(tmp_path, state, range(1, 8), keep=2,
       losses=[5.0, 3.0, 1.0, 4.0, 2.0, 6.0, 7.0])
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()
                if p.name.isdigit())
  assert kept == [3, 6, 7]


def truncate_arrays(folder: pathlib.Path):
  largest = max((f for f in (folder / "params").rglob("*") if f.is_file()),
                key=lambda f: f.stat().st_size)
  with largest.open("r+b") as f:
    f.truncate(largest.stat().st_size // 2)


def truncate_optimizer_index(folder: pathlib.Path):
  for manifest in (folder / "rest").rglob("manifest.ocdbt"):
    manifest.write_bytes(manifest.read_bytes()[:20])


def lose_data_position(folder: pathlib.Path):
  shutil.rmtree(folder / "data")


def empty_metadata(folder: pathlib.Path):
  (folder / "params" / "_METADATA").write_text("")


@pytest.mark.parametrize("damage", [truncate_arrays, truncate_optimizer_index,
                                    lose_data_position, empty_metadata])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, state,
                                                          damage):
  save(tmp_path, state, [4, 8])
  damage(tmp_path / "checkpoints" / "8")
  restored, position, lines = restore(tmp_path, state)
  assert restored.step == 4 and position == 4
  assert len(lines) == 1 and "\n" not in lines[0]
  assert str(tmp_path / "checkpoints" / "8") in lines[0]
  # Out of the way of the next save of step 8, and not lost.
  assert (tmp_path / "damaged_checkpoints" / "8").is_dir()
  save(tmp_path, state, [8])
  assert restore(tmp_path, state)[0].step == 8


def test_nothing_readable_is_an_error_that_keeps_everything(tmp_path, state):
  save(tmp_path, state, [4])
  truncate_arrays(tmp_path / "checkpoints" / "4")
  # Again and again: a second start must not take the folder for a new run's.
  for _ in range(2):
    with pytest.raises(UserError, match="no checkpoint that can be read"):
      restore(tmp_path, state)
  assert (tmp_path / "checkpoints" / "4").is_dir()


def test_reading_parameters_moves_nothing(tmp_path, state, tiny_config):
  save(tmp_path, state, [4, 8])
  truncate_arrays(tmp_path / "checkpoints" / "8")
  lines = []
  step, params = load_run_params(tmp_path, tiny_config(), lines.append)
  assert step == 4 and len(lines) == 1
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  assert (tmp_path / "checkpoints" / "8").is_dir()
  with pytest.raises(UserError, match="no checkpoint 5; it has 4, 8"):
    load_run_params(tmp_path, tiny_config(), lines.append, step=5)
  with pytest.raises(UserError, match="--step=8: .* cannot be read"):
    load_run_params(tmp_path, tiny_config(), lines.append, step=8)


def test_a_checkpoint_restores_on_another_mesh(tmp_path, tiny_config):
  def sharded(**axes):
    config = tiny_config(**{"model.vocab_size": 264}, **{
        f"training.mesh.{k}": v for k, v in axes.items()})
    create = functools.partial(init_state, config, ADAM)
    shardings = mesh_lib.shardings(mesh_lib.make_mesh(config),
                                   jax.eval_shape(create))
    return jax.jit(create, out_shardings=shardings)()

  saved, other = sharded(fsdp=8, data=1), sharded(data=4, tensor=2)
  save(tmp_path, saved, [3])
  restored, _, _ = restore(tmp_path, other)
  jax.tree.map(np.testing.assert_array_equal, restored, at(saved, 3))
  for name in ("params", "sparsity"):
    jax.tree.map(assert_same_sharding, getattr(restored, name),
                 getattr(other, name))
  # The neurons' idle counts lie where the neurons do.
  assert other.sparsity.idle_NxF.addressable_shards[0].data.shape == (2, 32)


def assert_same_sharding(a, b):
  assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
