"""Every key of an experiment: its type, default, unit and check.

An experiment is a `Config`, a tree of frozen dataclasses. Files in `configs/`
build one; flags such as `--config.model.ffn.active_fraction=0.05` change one;
`config.json` in a run's folder records one. A field's comment carries the
letter that the code uses for it (see the README, "Alphabet").

Fields marked with `free()` may differ between a run and its resumption: they
change where or how often things happen, never what is learnt.
"""

import dataclasses
import difflib
import json
import typing
from typing import Any

from sparse_lm.config.checks import check
from sparse_lm.config.model import (ACTIVATIONS, RELU_FAMILY, WITH_THRESHOLD,
                                    AttentionConfig, FFNConfig,
                                    LinearInputsConfig, ModelConfig)
from sparse_lm.config.training import (DataConfig, DeadNeuronsConfig,
                                       MeshConfig, OptimizerConfig,
                                       PenaltyConfig, SampleConfig,
                                       TrainingConfig)
from sparse_lm.errors import UserError

__all__ = [
    "ACTIVATIONS", "RELU_FAMILY", "AttentionConfig", "Config", "DataConfig",
    "DeadNeuronsConfig", "FFNConfig", "LinearInputsConfig", "MeshConfig",
    "ModelConfig", "OptimizerConfig", "PenaltyConfig", "SampleConfig",
    "TrainingConfig", "WITH_THRESHOLD", "check_key", "differences", "flatten", "from_dict",
    "replace", "to_dict", "to_json",
]


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment."""

  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  training: TrainingConfig = TrainingConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    length, chunk = self.model.context_length, self.training.loss_chunk
    check(chunk == 0 or length % chunk == 0, "training.loss_chunk",
          f"{chunk} does not divide model.context_length={length}")
    self._check_sparsity()

  def _check_sparsity(self) -> None:
    """That the model has what the training's penalties and repair act on."""
    penalty, ffn = self.training.penalty, self.model.ffn
    relu = ffn.activation in RELU_FAMILY
    for name in ("adjacent", "chunk"):
      check(not getattr(penalty, name) or (
          relu and ffn.sparsifier == "none" and ffn.up_activation == "linear"),
            f"training.penalty.{name}", "needs model.ffn.activation to be one "
            f"of {', '.join(RELU_FAMILY)}, sparsifier=none and "
            "up_activation=linear")
    exact = relu or ffn.sparsifier != "none"
    why = (f"model.ffn.activation={ffn.activation} without a sparsifier leaves "
           "no neuron inactive")
    check(penalty.schedule != "controller" or exact,
          "training.penalty.schedule", f"controller: {why}")
    check(not self.training.dead_neurons.after_tokens or exact,
          "training.dead_neurons.after_tokens", why)
    check(penalty.schedule == "none"
          or self.model.linear_inputs.sparsifier == "none"
          or not self.model.linear_inputs.rescale, "training.penalty.schedule",
          "L1 cannot shrink what model.linear_inputs.rescale scales up again")


def to_dict(config) -> dict[str, Any]:
  """The config as nested dicts of plain values."""
  return dataclasses.asdict(config)


def to_json(config: Config) -> str:
  return json.dumps(to_dict(config), indent=2) + "\n"


def flatten(config, prefix: str = "") -> dict[str, Any]:
  """`{"model.ffn.num_neurons": 1024, ...}`."""
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    key = prefix + field.name
    if dataclasses.is_dataclass(value):
      flat.update(flatten(value, key + "."))
    else:
      flat[key] = value
  return flat


def check_key(key: str, config: Config) -> None:
  """Raises a `UserError` with the nearest valid keys unless `key` is one."""
  keys = list(flatten(config))
  if key in keys:
    return
  last = key.rsplit(".", 1)[-1]
  near = [k for k in keys if k.rsplit(".", 1)[-1] == last]
  near += difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
  near += [k for k in keys if k.startswith(key + ".")]
  hint = ", ".join(f"config.{k}" for k in dict.fromkeys(near)) or (
      "see sparse_lm/config/")
  raise UserError(f"config.{key}: no such key; nearest: {hint}")


def _convert(value: Any, kind: type, key: str) -> Any:
  if typing.get_origin(kind) is tuple:
    check(isinstance(value, (list, tuple)), key, f"{value!r} is not a list")
    return tuple(_convert(x, typing.get_args(kind)[0], key) for x in value)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if type(value) is not kind:
    raise UserError(f"config.{key}: {value!r} is a {type(value).__name__}, "
                    f"not a {kind.__name__}")
  return value


def from_dict(values: dict[str, Any], cls: type = Config, prefix: str = ""):
  """The inverse of `to_dict`, with every key and type checked.

  Keys that `values` lacks keep their defaults, so that a config written before
  a key existed can still be read.
  """
  kinds = typing.get_type_hints(cls)
  for name in values:
    if name not in kinds:
      check_key(prefix + name, Config())
  arguments = {}
  for name, value in values.items():
    key, kind = prefix + name, kinds[name]
    if dataclasses.is_dataclass(kind):
      check(isinstance(value, dict), key, "is a group of keys, not a value")
      arguments[name] = from_dict(value, kind, key + ".")
    else:
      arguments[name] = _convert(value, kind, key)
  return cls(**arguments)


def replace(config: Config, **changes: Any) -> Config:
  """`replace(config, **{"model.num_layers": 2})`: a config with keys changed.

  Raises:
    UserError: on an unknown key, a value of the wrong type or a failed check.
  """
  values = to_dict(config)
  for key, value in changes.items():
    check_key(key, config)
    *groups, name = key.split(".")
    group = values
    for part in groups:
      group = group[part]
    group[name] = value
  return from_dict(values)


def _free_keys(cls: type, prefix: str = "") -> set[str]:
  keys = set()
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      keys |= _free_keys(field.type, prefix + field.name + ".")
    elif field.metadata.get("free"):
      keys.add(prefix + field.name)
  return keys


def differences(a: Config, b: Config) -> list[str]:
  """Keys, apart from the free ones, in which two configs differ."""
  flat_a, flat_b, free_keys = flatten(a), flatten(b), _free_keys(Config)
  return [key for key in flat_a
          if key not in free_keys and flat_a[key] != flat_b[key]]
