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

from sparse_lm.errors import UserError

FFN_SHAPES = ("plain", "gated", "spark")
ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_tanh")
SPARSIFIERS = ("none", "statistical_topk")
ATTENTION_SHAPES = ("dense", "spark")
SCHEDULES = ("cosine", "warmup_stable_decay", "constant")
REMAT = ("none", "block")
DTYPES = ("auto", "float32", "bfloat16")
DISTRIBUTED = ("auto", "on", "off")


def free(default):
  """A field that a resumed run may set differently from the first one."""
  return dataclasses.field(default=default, metadata={"free": True})


def check(ok: bool, key: str, message: str) -> None:
  """Raises a `UserError` that names `config.<key>` unless `ok`."""
  if not ok:
    raise UserError(f"config.{key}: {message}")


def check_choice(value: str, choices: tuple[str, ...], key: str) -> None:
  check(value in choices, key,
        f"{value!r} is not one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class FFNConfig:
  """A feed-forward layer: shape x activation x sparsifier."""

  # plain: down(act(up x)). gated: down(act(gate x) * (up x)).
  # spark: the first R input dims predict, the other D-R gate; no more
  # parameters than plain.
  shape: str = "spark"
  num_neurons: int = 1024  # F
  activation: str = "gelu_tanh"  # see model/activations.py
  # Applied to what enters the activation (the predictor's or gate's output).
  sparsifier: str = "statistical_topk"
  active_fraction: float = 0.08  # k / F, the fraction the sparsifier keeps
  predictor_dim: int = 128  # R, spark only: input dims that predict
  bessel: bool = False  # std over F-1 (True) or over F (False)
  huber_delta: float = 0.0  # width of the smoothed corner; 0: a plain corner

  def __post_init__(self):
    check_choice(self.shape, FFN_SHAPES, "model.ffn.shape")
    check_choice(self.activation, ACTIVATIONS, "model.ffn.activation")
    check_choice(self.sparsifier, SPARSIFIERS, "model.ffn.sparsifier")
    check(self.num_neurons > 0, "model.ffn.num_neurons",
          f"{self.num_neurons} must be above 0")
    check(0 < self.active_fraction <= 1, "model.ffn.active_fraction",
          f"{self.active_fraction} must be in (0, 1]")
    check(self.active_fraction * self.num_neurons >= 1,
          "model.ffn.active_fraction",
          f"{self.active_fraction} of {self.num_neurons} neurons keeps none")
    check(self.huber_delta >= 0, "model.ffn.huber_delta",
          f"{self.huber_delta} must not be negative")

  @property
  def num_active(self) -> int:
    """k: how many of the F neurons the sparsifier aims to keep."""
    if self.sparsifier == "none":
      return self.num_neurons
    return round(self.active_fraction * self.num_neurons)

  def input_dims(self, model_dim: int) -> tuple[int, int]:
    """How many input dims the gate reads, and how many up reads."""
    return {"plain": (model_dim, 0), "gated": (model_dim, model_dim),
            "spark": (self.predictor_dim, model_dim - self.predictor_dim),
            }[self.shape]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Grouped-query attention, dense or Spark, global or sliding-window."""

  shape: str = "spark"
  num_query_heads: int = 4  # H
  num_kv_heads: int = 2  # K; each serves H / K query heads
  head_dim: int = 64  # E
  # Tokens that a sliding-window layer sees, itself included; 0: every layer
  # is global.
  sliding_window: int = 0
  # With a sliding window, one layer in so many is global, the last of each
  # group: 2 alternates sliding, global, sliding, global, as in Gemma 2.
  global_every: int = 2
  logit_softcap: float = 0.0  # cap * tanh(logits / cap); 0: off
  rope_base: float = 10_000.0  # longest rotary wavelength / (2 pi)
  top_k: int = 256  # keys that a query attends to, spark only
  predictor_dim: int = 32  # head dims that predict, spark only; even
  # Queries scored against the keys at a time; 0: all at once. Changes the
  # memory of a training step, never its result.
  query_chunk: int = free(0)

  def __post_init__(self):
    check_choice(self.shape, ATTENTION_SHAPES, "model.attention.shape")
    for name in ("num_query_heads", "num_kv_heads", "head_dim", "global_every",
                 "top_k"):
      check(getattr(self, name) > 0, f"model.attention.{name}",
            f"{getattr(self, name)} must be above 0")
    for name in ("sliding_window", "logit_softcap", "query_chunk"):
      check(getattr(self, name) >= 0, f"model.attention.{name}",
            f"{getattr(self, name)} must not be negative")
    check(self.num_query_heads % self.num_kv_heads == 0,
          "model.attention.num_query_heads",
          f"{self.num_query_heads} is not divisible by "
          f"num_kv_heads={self.num_kv_heads}")
    check(self.rope_base > 0, "model.attention.rope_base",
          f"{self.rope_base} must be above 0")
    check(self.head_dim % 2 == 0, "model.attention.head_dim",
          f"{self.head_dim} must be even for rotary embeddings")
    if self.shape == "spark":
      check(0 < self.predictor_dim < self.head_dim
            and self.predictor_dim % 2 == 0,
            "model.attention.predictor_dim",
            f"{self.predictor_dim} must be even and in "
            f"(0, head_dim={self.head_dim})")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only Transformer in the manner of Gemma 2."""

  vocab_size: int = 4096  # V; the tokenizer's size
  context_length: int = 256  # L; tokens in a training sequence and the cache
  num_layers: int = 4  # N
  model_dim: int = 256  # D
  ffn: FFNConfig = FFNConfig()
  attention: AttentionConfig = AttentionConfig()
  final_logit_softcap: float = 0.0  # as logit_softcap, on the output logits
  norm_epsilon: float = 1e-6
  # Run the layers as one scanned body (compiles N times faster) or unrolled
  # (XLA may overlap layers). The parameters are the same.
  scan_layers: bool = free(False)
  # block: recompute each block in the backward pass instead of storing it.
  remat: str = free("none")
  # auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters are float32.
  compute_dtype: str = "auto"

  def __post_init__(self):
    check_choice(self.remat, REMAT, "model.remat")
    check_choice(self.compute_dtype, DTYPES, "model.compute_dtype")
    for name in ("vocab_size", "num_layers", "model_dim"):
      check(getattr(self, name) > 0, f"model.{name}",
            f"{getattr(self, name)} must be above 0")
    check(self.context_length > 1, "model.context_length",
          f"{self.context_length} must be above 1")
    check(self.norm_epsilon > 0, "model.norm_epsilon",
          f"{self.norm_epsilon} must be above 0")
    check(self.final_logit_softcap >= 0, "model.final_logit_softcap",
          f"{self.final_logit_softcap} must not be negative")
    if self.ffn.shape == "spark":
      check(0 < self.ffn.predictor_dim < self.model_dim,
            "model.ffn.predictor_dim",
            f"{self.ffn.predictor_dim} must be in "
            f"(0, model_dim={self.model_dim})")
    chunk = self.attention.query_chunk
    check(chunk == 0 or self.context_length % chunk == 0,
          "model.attention.query_chunk",
          f"{chunk} does not divide context_length={self.context_length}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the tokens come from."""

  # python_source/stdlib, python_source/environment, text_folder, or any TFDS
  # text dataset: lm1b, c4, wiki40b/en, tiny_shakespeare, ...
  dataset: str = "python_source/stdlib"
  path: str = ""  # text_folder only: a folder of .txt, .md, .py, .jsonl files
  text_key: str = "text"  # the feature (or .jsonl field) that holds the text
  train_split: str = "train"
  eval_split: str = "validation"
  # bytes; bpe (byte-level, trained once on the corpus); or a path to a
  # tokenizer.json.
  tokenizer: str = "bpe"
  # Packed sequences in the shuffle window that follows packing. Large
  # documents fill many sequences in a row; the window spreads them.
  shuffle_window: int = 1024
  num_workers: int = 0  # processes that prepare batches; 0: threads
  cache_dir: str = free("~/.cache/sparse_lm")  # prepared data, reused

  def __post_init__(self):
    check(bool(self.dataset), "data.dataset", "must not be empty")
    check(bool(self.tokenizer), "data.tokenizer", "must not be empty")
    check((self.dataset == "text_folder") == bool(self.path), "data.path",
          "goes with dataset=text_folder, and text_folder needs it")
    check(self.shuffle_window >= 1, "data.shuffle_window",
          f"{self.shuffle_window} must be at least 1")
    check(self.num_workers >= 0, "data.num_workers",
          f"{self.num_workers} must not be negative")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a learning-rate schedule."""

  learning_rate: float = 2e-3  # the peak
  schedule: str = "cosine"
  warmup_steps: int = 50
  decay_steps: int = 0  # warmup_stable_decay only: the last steps, decaying
  final_fraction: float = 0.1  # of the peak, at the last step
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # on matrices; norms' scales are left alone
  clip_norm: float = 1.0  # of the whole gradient; 0: off

  def __post_init__(self):
    check_choice(self.schedule, SCHEDULES, "training.optimizer.schedule")
    for name in ("learning_rate", "epsilon"):
      check(getattr(self, name) > 0, f"training.optimizer.{name}",
            f"{getattr(self, name)} must be above 0")
    for name in ("warmup_steps", "decay_steps", "weight_decay", "clip_norm"):
      check(getattr(self, name) >= 0, f"training.optimizer.{name}",
            f"{getattr(self, name)} must not be negative")
    for name in ("beta1", "beta2"):
      check(0 <= getattr(self, name) < 1, f"training.optimizer.{name}",
            f"{getattr(self, name)} must be in [0, 1)")
    check(0 <= self.final_fraction <= 1, "training.optimizer.final_fraction",
          f"{self.final_fraction} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices are arranged. The product must be the device count."""

  data: int = free(-1)  # copies of the model; -1: the devices left over
  fsdp: int = free(1)  # shards of the batch and of every parameter's D
  tensor: int = free(1)  # shards of the heads, the neurons, the vocabulary
  # Call jax.distributed.initialize: auto does so where a cluster (SLURM, GKE,
  # a TPU pod, ...) is detected.
  distributed: str = free("auto")

  def __post_init__(self):
    check_choice(self.distributed, DISTRIBUTED, "training.mesh.distributed")
    check(self.data == -1 or self.data > 0, "training.mesh.data",
          f"{self.data} must be above 0, or -1 for the devices left over")
    for name in ("fsdp", "tensor"):
      check(getattr(self, name) > 0, f"training.mesh.{name}",
            f"{getattr(self, name)} must be above 0")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How the model learns, and how often one hears of it."""

  num_steps: int = 1000
  batch_size: int = 16  # B; sequences in a step, over all devices
  micro_batches: int = 1  # a step's batch is split in so many, one by one
  z_loss: float = 1e-4  # weight of the mean of log(Z)^2
  # Positions whose logits are alive at a time; 0: all. Changes the memory of
  # a step, never its result.
  loss_chunk: int = free(0)
  seed: int = 0
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  log_every: int = free(20)  # steps
  eval_every: int = free(200)  # steps; ranks the checkpoint of its step
  eval_batches: int = free(16)  # at most, in an evaluation
  checkpoint_every: int = free(200)  # steps
  # The newest so many, and that of the lowest held-out loss among those saved
  # at a step that evaluates.
  keep_checkpoints: int = free(2)

  def __post_init__(self):
    for name in ("num_steps", "batch_size", "micro_batches", "log_every",
                 "eval_every", "eval_batches", "checkpoint_every",
                 "keep_checkpoints"):
      check(getattr(self, name) > 0, f"training.{name}",
            f"{getattr(self, name)} must be above 0")
    for name in ("z_loss", "loss_chunk"):
      check(getattr(self, name) >= 0, f"training.{name}",
            f"{getattr(self, name)} must not be negative")
    check(0 <= self.seed < 2**32, "training.seed",
          f"{self.seed} must be in [0, 2^32)")
    check(self.batch_size % self.micro_batches == 0,
          "training.micro_batches",
          f"{self.micro_batches} does not divide batch_size={self.batch_size}")
    opt = self.optimizer
    check(opt.warmup_steps + opt.decay_steps <= self.num_steps,
          "training.optimizer.warmup_steps",
          f"{opt.warmup_steps} and decay_steps={opt.decay_steps} go past "
          f"num_steps={self.num_steps}")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The completion that is shown when a run ends."""

  prompt: str = free("def ")
  max_new_tokens: int = free(64)
  temperature: float = free(0.8)  # 0: greedy

  def __post_init__(self):
    check(self.max_new_tokens > 0, "sample.max_new_tokens",
          f"{self.max_new_tokens} must be above 0")
    check(self.temperature >= 0, "sample.temperature",
          f"{self.temperature} must not be negative")


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
      "see sparse_lm/config.py")
  raise UserError(f"config.{key}: no such key; nearest: {hint}")


def _convert(value: Any, kind: type, key: str) -> Any:
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
