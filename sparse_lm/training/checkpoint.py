"""Checkpoints: Orbax, asynchronous, the last few and the best.

A checkpoint holds three items: `params` (what evaluate and generate read),
`rest` (optimizer, step, what the penalties remember) and `data` (the Grain
iterator's position). Random keys need no saving: they derive from the seed,
which is in `config.json`, and the step. Orbax writes to a temporary folder and
renames it, so that a save cut short leaves nothing that looks like a
checkpoint.
"""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sparse_lm.config import Config
from sparse_lm.errors import UserError
from sparse_lm.training.sparsity import SparsityState
from sparse_lm.training.step import TrainState, abstract_params

FOLDER = "checkpoints"
DAMAGED = "damaged_checkpoints"


def _rest(state: TrainState) -> dict[str, Any]:
  return {"step": state.step, "optimizer": state.optimizer,
          "sparsity": dict(vars(state.sparsity))}


def _manager(folder: pathlib.Path, **options) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
      folder.absolute(), options=ocp.CheckpointManagerOptions(**options))


def _reason(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _newest_readable(manager: ocp.CheckpointManager,
                     read: Callable[[int], Any],
                     report: Callable[[str], None]
                     ) -> tuple[int, Any, list[int]]:
  """The newest step that `read` can read, what it returned, what it could not.

  A file cut short shows up as an error of any type from deep inside, so every
  exception counts as damage here; the message keeps what was said.
  """
  damaged = []
  for step in sorted(manager.all_steps(), reverse=True):
    try:
      return step, read(step), damaged
    except Exception as e:  # pylint: disable=broad-exception-caught
      report(f"warning: checkpoint {manager.directory / str(step)} cannot be "
             f"read, trying the one before it ({_reason(e)})")
      damaged.append(step)
  raise UserError(f"{manager.directory}: holds no checkpoint that can be read; "
                  "nothing was changed. To start over, name another workdir")


class Checkpointer:
  """Saves and restores the state of a run in `workdir/checkpoints`."""

  def __init__(self, workdir: pathlib.Path, keep: int,
               keep_steps: Sequence[int] = ()):
    """Keeps the newest `keep` checkpoints, that of the lowest loss, and those
    of `keep_steps`."""
    self._workdir = workdir
    policies = checkpoint_managers
    self._manager = _manager(
        workdir / FOLDER, cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy([
            policies.LatestN(n=keep), policies.CustomSteps(keep_steps),
            policies.BestN(get_metric_fn=lambda m: m["loss"], reverse=True,
                           n=1, keep_checkpoints_without_metrics=False)]))

  def save(self, state: TrainState, data_iterator, loss: float | None) -> None:
    """Starts a save; returns once the arrays are copied off the devices.

    Args:
      state: its step names the checkpoint.
      data_iterator: the Grain iterator, after the step's batch.
      loss: held-out loss at this step, where it was measured.
    """
    # Here, not at the top: reading a checkpoint needs no Grain.
    from grain import checkpoint as grain_checkpoint  # pylint: disable=g-import-not-at-top
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._manager.save(
        step, metrics=None if loss is None else {"loss": loss},
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(_rest(state)),
            data=grain_checkpoint.CheckpointSave(data_iterator)))

  def restore(self, state: TrainState, data_iterator,
              report: Callable[[str], None]) -> TrainState | None:
    """The newest readable checkpoint, or None where there is none at all.

    A damaged one is moved to `workdir/damaged_checkpoints`, not deleted, and
    the one before it is used.

    Args:
      state: shapes, types and shardings to restore to; the mesh may differ
        from the one that saved.
      data_iterator: is set to the checkpoint's position.
      report: told of damage.
    """
    from grain import checkpoint as grain_checkpoint  # pylint: disable=g-import-not-at-top
    if not self._manager.all_steps():
      return None

    def read(step):
      return self._manager.restore(step, args=ocp.args.Composite(
          params=ocp.args.StandardRestore(state.params),
          rest=ocp.args.StandardRestore(_rest(state)),
          data=grain_checkpoint.CheckpointRestore(data_iterator)))

    _, items, damaged = _newest_readable(self._manager, read, report)
    # Only now: had none been readable, the fault might not be the files'.
    self.set_aside(damaged)
    return TrainState(
        params=items.params,
        **{**items.rest, "sparsity": SparsityState(**items.rest["sparsity"])})

  def set_aside(self, steps: list[int]) -> None:
    """Moves those of the steps that are saved to `workdir/DAMAGED`."""
    self.wait()
    steps = [step for step in steps if step in self._manager.all_steps()]
    if not steps:
      return
    if jax.process_index() == 0:
      target = self._workdir / DAMAGED
      target.mkdir(exist_ok=True)
      for step in steps:
        number = sum(1 for _ in target.glob(f"{step}*"))
        (self._workdir / FOLDER / str(step)).rename(
            target / (f"{step}.{number}" if number else str(step)))
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    self._manager.reload()

  def wait(self) -> None:
    """Returns when every save that was started is complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def is_saved(workdir: pathlib.Path, step: int) -> bool:
  """Whether a checkpoint of a step is complete."""
  return (workdir / FOLDER / str(step)).is_dir()


def restore_data(workdir: pathlib.Path, step: int, data_iterator) -> None:
  """Sets the Grain iterator to where a checkpoint's was."""
  from grain import checkpoint as grain_checkpoint  # pylint: disable=g-import-not-at-top
  with _manager(workdir / FOLDER, read_only=True) as manager:
    manager.restore(step, args=ocp.args.Composite(
        data=grain_checkpoint.CheckpointRestore(data_iterator)))


def save_params(workdir: pathlib.Path, step: int, params: Any) -> None:
  """Writes a checkpoint that can be evaluated and decoded from, not resumed."""
  with _manager(workdir / FOLDER) as manager:
    manager.save(step, args=ocp.args.Composite(
        params=ocp.args.StandardSave(params)))


def load_params(workdir: pathlib.Path, params: Any,
                report: Callable[[str], None],
                step: int | None = None,
                step_key: str = "--step") -> tuple[int, Any]:
  """The parameters of a run's checkpoint, and its step. Changes nothing.

  Args:
    workdir: the run's folder.
    params: shapes, types and shardings.
    report: told when a damaged checkpoint is passed over.
    step: which checkpoint; None: the newest readable one.
    step_key: where the caller's user set `step`, for messages.

  Raises:
    UserError: where there is no such checkpoint.
  """
  folder = workdir / FOLDER
  if not folder.is_dir():
    raise UserError(f"{workdir}: holds no checkpoints; train a model there "
                    "first (make train)")
  with _manager(folder, read_only=True) as manager:
    steps = sorted(manager.all_steps())
    if step is not None and step not in steps:
      raise UserError(f"{step_key}: {folder} has no checkpoint {step}; it has "
                      f"{', '.join(map(str, steps)) or 'none'}")

    def read(number):
      return manager.restore(number, args=ocp.args.Composite(
          params=ocp.args.StandardRestore(params))).params

    if step is None:
      return _newest_readable(manager, read, report)[:2]
    try:
      return step, read(step)
    except Exception as e:  # pylint: disable=broad-exception-caught
      raise UserError(f"{step_key}={step}: {folder / str(step)} cannot be read "
                      f"({_reason(e)})") from e


def load_run_params(workdir: pathlib.Path, config: Config,
                    report: Callable[[str], None],
                    step: int | None = None) -> tuple[int, Any]:
  """`load_params` of a run onto this process's first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = abstract_params(config)
  return load_params(
      workdir, jax.tree.map(lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding), shapes), report, step)
