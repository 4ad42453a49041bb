"""The training loop.

What happens on a start, in this order: the folder is checked for another
config's run; the data are prepared or reused; the mesh is made; the state is
restored from the newest readable checkpoint, or created sharded, with another
run's parameters where `training.start_from` names one; the folder
is made the run's; the step is compiled; the loop runs. In the loop, step n is
dispatched before the metrics of the steps before it are fetched, so that the
devices never wait for the host.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from sparse_lm import flops
from sparse_lm.config import Config
from sparse_lm.data.pipeline import Corpus, open_corpus
from sparse_lm.errors import UserError
from sparse_lm.training import metrics as metrics_lib
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training import program
from sparse_lm.training import workdir as workdir_lib
from sparse_lm.training import start as start_lib
from sparse_lm.training.checkpoint import FOLDER, Checkpointer
from sparse_lm.training.step import TrainState, make_eval_step

Report = Callable[[str], None]
# Flushed: a line that waits in a pipe's buffer is no progress to whoever reads.
print_line = functools.partial(print, flush=True)


class Stopped(Exception):
  """The run was asked to stop; its state is saved."""


@dataclasses.dataclass
class Outcome:
  """What a finished run leaves in memory."""

  state: TrainState
  evaluation: dict[str, Any]  # see metrics.summarize
  corpus: Corpus


class StopSignal:
  """Turns SIGTERM and SIGINT into a question that the loop asks each step.

  In a cluster the question is put to JAX's preemption service, which answers
  SIGTERM alone, to every process at the same step.
  """

  def __init__(self):
    self._name = ""
    self._previous = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      # In a cluster a process must not decide alone: the others would wait.
      numbers = ([signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1
                 else [])
      self._previous = {n: signal.signal(n, self._receive) for n in numbers}
    return self

  def _receive(self, number, frame):
    del frame
    self._name = signal.Signals(number).name
    # A second one is not caught: it ends the process at once.
    signal.signal(number, self._previous[number])

  def __exit__(self, *unused):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> str:
    """The reason to stop after `step`, or an empty string."""
    if jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        return "preemption"
    return self._name


class Clock:
  """Tokens per second of training alone: compile and evaluation left out."""

  def __init__(self):
    self._start = time.perf_counter()
    self._paused = 0.0

  @contextlib.contextmanager
  def pause(self):
    """Within it, time does not count."""
    start = time.perf_counter()
    yield
    self._paused += time.perf_counter() - start

  def lap(self) -> float:
    """Seconds of training since the last lap."""
    now = time.perf_counter()
    seconds = now - self._start - self._paused
    self._start, self._paused = now, 0.0
    return max(seconds, 1e-9)


class Trainer:
  """One run: its compiled steps, its state and its files."""

  def __init__(self, config: Config, workdir: pathlib.Path, report: Report):
    self.config, self.workdir = config, workdir
    self.report = report if jax.process_index() == 0 else lambda _: None
    self.corpus = open_corpus(config)
    self._check_data()
    self._check_prompt()
    self.mesh = mesh_lib.make_mesh(config)
    self.checkpointer = Checkpointer(
        workdir, config.training.keep_checkpoints, config.training.keep_steps)
    self.batches = iter(self.corpus.train(jax.process_index(),
                                          jax.process_count()))
    self.state = self._restore_or_create()
    self.step = int(self.state.step)
    if jax.process_index() == 0:
      workdir_lib.record(workdir, config, self.corpus)
    self.writer = metrics_lib.MetricsWriter(workdir, self.step)
    self.text_bytes_V = metrics_lib.text_bytes(config.model,
                                               self.corpus.tokenizer)
    self._unlogged = []  # (step, metrics on the devices) since the last line
    self._evaluation = None  # (step, summary) of the newest evaluation

  def _check_data(self) -> None:
    fingerprint = self.corpus.fingerprint
    workdir_lib.check_data(self.workdir, fingerprint)
    mine = np.array([int(fingerprint, 16) % 2**31], np.int32)
    if len(np.unique(multihost_utils.process_allgather(mine))) > 1:
      raise UserError("config.data: the processes have different data; the "
                      "standard library of another Python is other data")

  def _check_prompt(self) -> None:
    """Before the training, not after it."""
    tokens = len(self.corpus.tokenizer.encode(self.config.sample.prompt)) + 1
    if tokens >= self.config.model.context_length:
      raise UserError(f"config.sample.prompt: {tokens} tokens do not fit "
                      "model.context_length with room for one more")

  def _restore_or_create(self) -> TrainState:
    abstract = program.abstract_state(self.config, self.mesh)
    state = self.checkpointer.restore(abstract, self.batches, self.report)
    if state:
      return state
    state = program.create_state(self.config, self.mesh)
    if not self.config.training.start_from:
      return state
    return dataclasses.replace(state, params=start_lib.load(
        self.config, abstract.params, self.corpus, self.batches, self.report))

  def _compile_train_step(self):
    start = time.perf_counter()
    step = program.lower_train_step(self.config, self.mesh,
                                    self.text_bytes_V).compile()
    self.report("compiled the training step in "
                f"{time.perf_counter() - start:.1f} s")
    return step

  @functools.cached_property
  def _eval_step(self):
    return jax.jit(make_eval_step(self.config, self.text_bytes_V),
                   out_shardings=NamedSharding(self.mesh, PartitionSpec()))

  def evaluate(self) -> dict[str, Any]:
    """Loss and sparsity on held-out data; once per step."""
    if self._evaluation and self._evaluation[0] == self.step:
      return self._evaluation[1]
    batches = self.corpus.evaluation(
        process_index=jax.process_index(), process_count=jax.process_count(),
        batches=self.config.training.eval_batches)
    sums = [self._eval_step(self.state.params,
                            mesh_lib.place_batch(self.mesh, batch))
            for batch in batches]
    summary = metrics_lib.summarize(metrics_lib.add_up(sums),
                                    self.config.model)
    if not np.isfinite(summary["loss"]):
      self._stop_at_nan(self.step, bad=self.step)
    self.writer.write(self.step, "eval", summary)
    self._evaluation = (self.step, summary)
    return summary

  def run(self) -> None:
    """Trains from where the state is to the last step.

    Raises:
      Stopped: after a signal, with the state saved.
      UserError: when the loss is no longer a number.
    """
    training = self.config.training
    train_step = self._compile_train_step()
    batch = mesh_lib.place_batch(self.mesh, next(self.batches))
    self.clock = Clock()
    with StopSignal() as stop:
      while True:
        self.state, metrics = train_step(self.state, batch)
        if self._due():  # Fetched while the step above runs.
          self._log()
        self.step += 1
        self._unlogged.append((self.step, metrics))
        last = self.step == training.num_steps
        reason = "" if last else stop.asked(self.step)
        if last or reason or self._saves() or (
            self.step % training.eval_every == 0):
          self._log()  # Raises before a NaN could be saved.
          with self.clock.pause():
            self._evaluate_and_save(last, reason)
        if reason:
          raise Stopped(f"{reason}: saved at step {self.step}; the same "
                        "command goes on from there")
        if last:
          return
        batch = mesh_lib.place_batch(self.mesh, next(self.batches))

  def _due(self) -> bool:
    return (bool(self._unlogged)
            and self._unlogged[-1][0] % self.config.training.log_every == 0)

  def _saves(self) -> bool:
    training = self.config.training
    return (self.step % training.checkpoint_every == 0
            or self.step in training.keep_steps)

  def _evaluate_and_save(self, last: bool, reason: str) -> None:
    training, loss = self.config.training, None
    # Who asks to stop may not wait for an evaluation.
    if last or (not reason and self.step % training.eval_every == 0):
      summary = self.evaluate()
      loss = summary["loss"]
      self.report(f"step {self.step:>6}  held out: loss {loss:.4f}  "
                  f"{summary['bits_per_byte']:.3f} bits/byte")
    if last or reason or self._saves():
      self.checkpointer.save(self.state, self.batches, loss)
    if last or reason:
      self.checkpointer.wait()

  def _log(self) -> None:
    """Fetches the metrics since the last line, checks, writes, prints."""
    if not self._unlogged:
      return
    window, self._unlogged = self._unlogged, []
    steps = [step for step, _ in window]
    fetched = jax.device_get([m for _, m in window])
    for step, m in zip(steps, fetched):
      # The loss is of the parameters before the step, which may be saved: they
      # are no good then. Their norm is of those after it, not yet saved.
      if not np.isfinite([m["sums"].loss, m["gradient_norm"]]).all():
        self._stop_at_nan(step, bad=step - 1)
      if not np.isfinite(m["parameter_norm"]):
        self._stop_at_nan(step, bad=step)
    sums = metrics_lib.add_up([m["sums"] for m in fetched])
    seconds = self.clock.lap()
    summary = metrics_lib.summarize(sums, self.config.model)
    rows = self.config.training.batch_size * len(window)
    rate = rows * self.config.model.context_length / seconds
    summary |= dict(
        gradient_norm=float(fetched[-1]["gradient_norm"]),
        parameter_norm=float(fetched[-1]["parameter_norm"]),
        learning_rate=float(fetched[-1]["learning_rate"]),
        penalty_factor=float(fetched[-1]["penalty_factor"]),
        tokens_per_second=rate, **self._utilization(rate))
    if "dead_fraction_N" in fetched[-1]:
      dead_N = fetched[-1]["dead_fraction_N"]
      summary |= dict(dead_fraction=float(dead_N.mean()),
                      dead_fraction_N=dead_N.tolist())
    self.writer.write(steps[-1], "train", summary)
    self._print_progress(steps[-1], summary, seconds / len(window))

  def _stop_at_nan(self, step: int, bad: int) -> None:
    self.checkpointer.set_aside([bad])
    raise UserError(
        f"step {step}: the loss, its gradient or the parameters are not finite "
        f"numbers; the last good checkpoint is in {self.workdir / FOLDER}. Try "
        "a lower config.training.optimizer.learning_rate or another "
        "config.training.seed in a new workdir")

  def _utilization(self, tokens_per_second: float) -> dict[str, float]:
    """Model FLOPs utilization: a step is 3 dense forward passes of FLOPs."""
    peak = flops.peak_flops(jax.devices()[0])
    if peak is None:
      return {}
    used = 3 * flops.dense_flops(self.config.model).total * tokens_per_second
    return {"mfu": used / (peak * jax.device_count())}

  def _print_progress(self, step, summary, seconds_per_step) -> None:
    num_steps = self.config.training.num_steps
    left = (num_steps - step) * seconds_per_step
    mfu = f"  MFU {summary['mfu']:.1%}" if "mfu" in summary else ""
    penalized = self.config.training.penalty.schedule != "none"
    factor = (f"  penalty factor {summary['penalty_factor']:.2e}"
              if penalized else "")
    self.report(
        f"step {step:>{len(str(num_steps))}}/{num_steps}"
        f"  loss {summary['loss']:.4f}"
        f"  {summary['bits_per_byte']:.3f} bits/byte"
        f"  {summary['tokens_per_second']:,.0f} tokens/s{mfu}"
        f"  active neurons {summary['active_fraction']:.1%}{factor}"
        f"  keys attended {summary['attended_keys']:.1f}"
        f"  ETA {math.floor(left / 60)}m{left % 60:02.0f}s")

  def close(self) -> None:
    self.batches.close()
    self.checkpointer.close()
    self.writer.close()


def train(config: Config, workdir: pathlib.Path,
          report: Report = print_line) -> Outcome | None:
  """Trains, or goes on training, the run in `workdir`.

  Args:
    config: the experiment.
    workdir: where its files go: config.json, tokenizer.json, metrics.jsonl,
      tensorboard/, checkpoints/.
    report: called with each line of progress.

  Returns:
    The end of the run; None where the run was complete already.

  Raises:
    UserError: on a mistake of the user's; the message names key or file.
    Stopped: after SIGTERM or SIGINT, with the state saved.
  """
  workdir = pathlib.Path(workdir)
  workdir_lib.check(workdir, config)
  with workdir_lib.locked(workdir):
    trainer = Trainer(config, workdir, report)
    try:
      if trainer.step >= config.training.num_steps:
        return None
      with jax.set_mesh(trainer.mesh):
        if trainer.step:
          trainer.report(f"resuming from step {trainer.step}")
        trainer.run()
        return Outcome(trainer.state, trainer.evaluate(), trainer.corpus)
    finally:
      trainer.close()
