"""A suite: configs trained one after another, to be compared.

Each run is a folder of its own, `<workdir>/<name>-seed<seed>`, that resumes
like any other, so a suite can be stopped and started again anywhere, and two
processes may share the methods of one workdir out between them.
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
from sparse_lm.training import loop, metrics, threshold, workdir
from sparse_lm.training.step import init_params

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
    return dataclasses.replace(self, methods=tuple(
        dataclasses.replace(method, config=override(method.config))
        for method in self.methods if method.name in wanted))


def folder(root: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  return root / f"{name}-seed{seed}"


def seeded(method: Method, root: pathlib.Path, seed: int) -> Config:
  """The config of a method's run of a seed."""
  changes = {"training.seed": seed}
  if method.start:
    changes["training.start_from"] = str(folder(root, method.start, seed))
  return config_lib.replace(method.config, **changes)


def run(suite: Suite, root: pathlib.Path, seeds: Sequence[int],
        report: Report) -> None:
  """Trains what is not trained yet.

  Raises:
    UserError: as training does.
    loop.Stopped: after a signal; the same call goes on from there.
  """
  todo = [(method, seed) for seed in seeds for method in suite.methods]
  for number, (method, seed) in enumerate(todo, start=1):
    target = folder(root, method.name, seed)
    config = seeded(method, root, seed)
    if not method.shift:
      workdir.check(target, config)
    if final_evaluation(target) is not None:
      continue
    report(f"\n[{number}/{len(todo)}] {method.label}, seed {seed}: {target}")
    start = time.perf_counter()
    if method.shift:
      threshold.sweep(folder(root, method.shift, seed), target,
                      suite.thresholds, suite.tolerance,
                      config.training.eval_batches, report)
    else:
      loop.train(config, target, report)
    report(f"{method.label}: {time.perf_counter() - start:.0f} s")


def final_evaluation(target: pathlib.Path) -> dict[str, Any] | None:
  """The evaluation after the last step of a finished run, else None."""
  if not (target / workdir.CONFIG).exists():
    return None
  last = workdir.read_config(target).training.num_steps
  found = [line for line in metrics.read(target)
           if line["split"] == "eval" and line["step"] == last]
  return found[-1] if found else None


def _speed(target: pathlib.Path) -> float:
  """Median tokens per second of the log lines; 0 where nothing was trained."""
  rates = [line["tokens_per_second"] for line in metrics.read(target)
           if line["split"] == "train"]
  return float(np.median(rates)) if rates else 0.0


def _parameters(config: Config) -> dict[str, int]:
  shapes = jax.eval_shape(lambda: init_params(config))
  total = sum(x.size for x in jax.tree.leaves(shapes))
  return {"parameters": total,
          "non_embedding": total - shapes["embedding_VxD"].size}


def _tokens(config: Config) -> int:
  """Tokens that a run's parameters are trained on, its start's included."""
  training = config.training
  steps = training.num_steps
  if training.start_from:
    source = workdir.read_config(pathlib.Path(training.start_from)).training
    steps += training.start_step or source.num_steps
  return steps * training.batch_size * config.model.context_length


def _result(target: pathlib.Path, evaluation: dict[str, Any]) -> dict[str, Any]:
  """What is kept of a finished run."""
  config = workdir.read_config(target)
  dense = flops.dense_flops(config.model, evaluation["visible_keys_N"])
  executed = flops.measured_flops(config.model, evaluation)
  return dict(evaluation, training_tokens=_tokens(config),
              tokens_per_second=_speed(target),
              threshold=config.model.ffn.threshold,
              hardware=json.loads((target / workdir.HARDWARE).read_text()),
              executed_flops=dict(vars(executed), total=executed.total),
              dense_flops=dict(vars(dense), total=dense.total),
              **_parameters(config))


def collect(suite: Suite, root: pathlib.Path,
            seeds: Sequence[int]) -> dict[str, Any]:
  """The results of every run that is finished.

  Returns:
    `suite`, and `methods`: for each its name, label, the keys in which its
    config differs from the first method's, and `runs`: by seed, the last
    evaluation (see `metrics.summarize`), `parameters`, `non_embedding`
    (parameters), `training_tokens`, `tokens_per_second`, `hardware`,
    `executed_flops` and `dense_flops` per token.
  """
  base = config_lib.flatten(suite.methods[0].config)
  rows = []
  for method in suite.methods:
    targets = {str(seed): folder(root, method.name, seed) for seed in seeds}
    finished = {seed: (target, final_evaluation(target))
                for seed, target in targets.items()}
    changes = {key: value for key, value
               in config_lib.flatten(method.config).items()
               if base[key] != value}
    rows.append(dict(
        name=method.name, label=method.label, changes=changes,
        runs={seed: _result(*found) for seed, found in finished.items()
              if found[1] is not None}))
  return dict(suite=suite.name, methods=rows)
