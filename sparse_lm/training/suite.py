"""A suite: configs trained one after another, to be compared.

Each run is a folder of its own, `<workdir>/<name>-seed<seed>`, that resumes
like any other, so a suite can be stopped and started again anywhere. Two
processes may train different methods in one workdir; a run that another process
is training is an error.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from sparse_lm import config as config_lib
from sparse_lm import flops
from sparse_lm.config import Config
from sparse_lm.errors import UserError
from sparse_lm.training import (checkpoint, loop, metrics, start, threshold,
                                workdir)
from sparse_lm.training.step import abstract_params

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the comparison.

  Attributes:
    name: of its run's folder, and in the results.
    label: in the table.
    config: what is trained.
    start: the method whose run of the same seed it starts from; "": none. The
      config's `training.start_step` says from which checkpoint.
    shift: the method whose run of the same seed is shifted to FATReLU, instead
      of training one; "": none.
  """

  name: str
  label: str
  config: Config
  start: str = ""
  shift: str = ""


@dataclasses.dataclass(frozen=True)
class Suite:
  """Methods, in the order of the table; the first is what they compare to.

  Attributes:
    name: of the results' files.
    methods: whatever one starts from stands before it.
    thresholds: candidates for methods that are shifted.
    tolerance: relative rise of their perplexity that is allowed.
  """

  name: str
  methods: tuple[Method, ...]
  thresholds: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2)
  tolerance: float = 0.01

  def __post_init__(self):
    seen = set()
    for method in self.methods:
      for other in filter(None, (method.start, method.shift)):
        if other not in seen:
          raise UserError(f"suite {self.name}: {method.name} needs {other}, "
                          "which does not stand before it")
      if method.name in seen:
        raise UserError(f"suite {self.name}: {method.name} is in it twice")
      seen.add(method.name)

  def part(self, names: Sequence[str],
           override: Callable[[Config], Config]) -> "Suite":
    """The methods of these names (none: all), and those that they need.

    Args:
      names: of methods.
      override: makes the config that is trained from the suite's.

    Raises:
      UserError: on a name that the suite lacks.
    """
    known = {method.name: method for method in self.methods}
    wanted, queue = set(), list(names) or list(known)
    while queue:
      name = queue.pop()
      if name not in known:
        raise UserError(f"--only: {name!r} is not one of {', '.join(known)}")
      wanted.add(name)
      queue += filter(None, (known[name].start, known[name].shift))
    chosen = [m for m in self.methods if m.name in wanted]
    starting = [m.name for m in chosen if m.start]
    methods = []
    for method in chosen:
      config = override(method.config)
      # The first method starts from none: it is here that this shows.
      changed = {"training.num_steps", "training.batch_size"} & set(
          config_lib.differences(method.config, config))
      if changed and starting:
        raise UserError(f"config.{changed.pop()}: cannot be overridden, since "
                        f"{starting[0]} starts from a step of another method; "
                        "name others in --only, or write a suite of your own")
      methods.append(dataclasses.replace(method, config=config))
    return dataclasses.replace(self, methods=tuple(methods))


def folder(root: pathlib.Path, name: str, seed: int | str) -> pathlib.Path:
  """Of a method's run."""
  return root / f"{name}-seed{seed}"


def seeded(suite: Suite, method: Method, root: pathlib.Path,
           seed: int) -> Config:
  """The config of a method's run of a seed.

  A run keeps the checkpoints that other methods start from.
  """
  starts = {m.config.training.start_step for m in suite.methods
            if m.start == method.name}
  changes = {"training.seed": seed, "training.keep_steps": tuple(sorted(
      {*method.config.training.keep_steps, *starts} - {0}))}
  if method.start:
    changes["training.start_from"] = str(folder(root, method.start, seed))
  return config_lib.replace(method.config, **changes)


def _check(suite: Suite, root: pathlib.Path, seeds: Sequence[int]) -> None:
  """Raises for what can be known to fail before anything is trained."""
  configs = {method.name: method.config for method in suite.methods}
  for method in suite.methods:
    if method.start:
      start.check_shapes(configs[method.start], method.config,
                         pathlib.Path(method.start))
    for seed in seeds:
      target = folder(root, method.name, seed)
      if not method.shift:
        if (target / workdir.CONFIG).exists():
          workdir.check(target, seeded(suite, method, root, seed))
      elif (target / threshold.FILE).exists():
        record = json.loads((target / threshold.FILE).read_text())
        if (record["thresholds"], record["tolerance"]) != (
            list(suite.thresholds), suite.tolerance):
          raise UserError(f"{target}: was made with other thresholds; remove "
                          "it to make it again")


def run(suite: Suite, root: pathlib.Path, seeds: Sequence[int],
        report: Report) -> list[str]:
  """Trains what is not trained yet.

  A run that fails, as one whose loss diverges does, does not keep the others
  from being trained.

  Returns:
    What failed: a line each.

  Raises:
    UserError: where a run cannot start.
    loop.Stopped: after a signal; the same call goes on from there.
  """
  _check(suite, root, seeds)
  failed = []
  todo = [(method, seed) for seed in seeds for method in suite.methods]
  for number, (method, seed) in enumerate(todo, start=1):
    target = folder(root, method.name, seed)
    if final_evaluation(target) is not None:
      continue
    report(f"\n[{number}/{len(todo)}] {method.label}, seed {seed}: {target}")
    begin = time.perf_counter()
    try:
      if method.shift:
        threshold.sweep(folder(root, method.shift, seed), target,
                        suite.thresholds, suite.tolerance,
                        method.config.training.eval_batches, report)
      else:
        loop.train(seeded(suite, method, root, seed), target, report)
    except UserError as e:
      failed.append(f"{method.label}, seed {seed}: {e}")
      report(f"failed: {failed[-1]}")
    else:
      report(f"{method.label}: {time.perf_counter() - begin:.0f} s")
  return failed


def final_evaluation(target: pathlib.Path) -> dict[str, Any] | None:
  """The evaluation after the last step of a finished run, else None."""
  if not (target / workdir.CONFIG).exists():
    return None
  last = workdir.read_config(target).training.num_steps
  found = [line for line in metrics.read(target)
           if line["split"] == "eval" and line["step"] == last]
  # The evaluation is written before the checkpoint is.
  return found[-1] if found and checkpoint.is_saved(target, last) else None


def _training_time(target: pathlib.Path,
                   config: Config) -> dict[str, float]:
  """`tokens_per_second`, the log lines' median, and `training_seconds`.

  Compilation, evaluation and checkpoints are left out. Both are 0 where nothing
  was trained.
  """
  per_step = config.training.batch_size * config.model.context_length
  rates, seconds, before = [], 0.0, 0
  for line in metrics.read(target):
    if line["split"] == "train":
      rates.append(line["tokens_per_second"])
      seconds += (line["step"] - before) * per_step / rates[-1]
      before = line["step"]
  return {"tokens_per_second": float(np.median(rates)) if rates else 0.0,
          "training_seconds": seconds}


def _parameters(config: Config) -> dict[str, int]:
  shapes = abstract_params(config)
  total = sum(x.size for x in jax.tree.leaves(shapes))
  return {"parameters": total,
          "non_embedding": total - shapes["embedding_VxD"].size}


def _tokens(suite: Suite, root: pathlib.Path, name: str, seed: str) -> int:
  """Tokens that a run's parameters are trained on, its start's included."""
  method = next(m for m in suite.methods if m.name == name)
  if method.shift:
    return _tokens(suite, root, method.shift, seed)
  config = workdir.read_config(folder(root, name, seed))
  training = config.training
  tokens = (training.num_steps * training.batch_size
            * config.model.context_length)
  if not method.start:
    return tokens
  source = workdir.read_config(folder(root, method.start, seed)).training
  share = (training.start_step or source.num_steps) / source.num_steps
  return tokens + round(share * _tokens(suite, root, method.start, seed))


def _result(target: pathlib.Path, evaluation: dict[str, Any]) -> dict[str, Any]:
  """What is kept of a finished run."""
  config = workdir.read_config(target)
  dense = flops.dense_flops(config.model, evaluation["visible_keys_N"])
  executed = flops.measured_flops(config.model, evaluation)
  return dict(evaluation, **_training_time(target, config),
              threshold=config.model.ffn.threshold,
              inputs_kept=flops.inputs_kept(config.model),
              hardware=json.loads((target / workdir.HARDWARE).read_text()),
              executed_flops=dict(vars(executed), total=executed.total),
              dense_flops=dict(vars(dense), total=dense.total),
              **_parameters(config))


def collect(suite: Suite, root: pathlib.Path) -> dict[str, Any]:
  """The results of every finished run in `root`, of any seed.

  Returns:
    `suite`, and `methods`: for each its name, label, the keys in which its
    config differs from the first method's, and `runs`: by seed, the last
    evaluation (see `metrics.summarize`), `parameters`, `non_embedding`
    (parameters), `inputs_kept` (of a linear map's), `training_tokens`,
    `tokens_per_second`, `training_seconds`, `hardware`, `executed_flops` and
    `dense_flops` per token.
  """
  base = suite.methods[0].config
  rows = []
  for method in suite.methods:
    runs = {}
    for target in sorted(root.glob(f"{method.name}-seed*")):
      evaluation = final_evaluation(target)
      if evaluation is not None:
        seed = target.name.removeprefix(f"{method.name}-seed")
        runs[seed] = dict(
            _result(target, evaluation),
            training_tokens=_tokens(suite, root, method.name, seed))
    # As it was trained, which may not be as the suite has it by now.
    config = (workdir.read_config(folder(root, method.name, min(runs)))
              if runs else method.config)
    values = config_lib.flatten(config)
    changes = {key: values[key] for key in config_lib.differences(base, config)
               if key != "training.seed"}
    rows.append(dict(name=method.name, label=method.label, changes=changes,
                     runs=runs))
  return dict(suite=suite.name, methods=rows)
