"""The keys of `config.data`, `config.training` and `config.sample`."""

import dataclasses

from sparse_lm.config.checks import check, check_choice, free

SCHEDULES = ("cosine", "warmup_stable_decay", "constant")
PENALTY_SCHEDULES = ("none", "constant", "progressive", "controller")
REDUCTIONS = ("sum", "mean")
DISTRIBUTED = ("auto", "on", "off")


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
class PenaltyConfig:
  """factor * L1 of the intermediate output h, and losses of locality.

  L1 is the mean over tokens of |h|, reduced over neurons and layers as below.
  """

  # none; constant: `factor`; progressive: ProSparse's, along `peaks`;
  # controller: `factor`, raised or lowered after every step by `rate`, as more
  # or fewer neurons than `target_active_fraction` are active (ReMoE's).
  schedule: str = "none"
  factor: float = 0.0  # constant: the factor; controller: the first one
  # progressive: see schedules.progressive_penalty. Boundaries are steps.
  peaks: tuple[float, ...] = ()
  boundaries: tuple[int, ...] = ()
  # A mean over neurons is F times smaller than the sum, one over layers N.
  over_neurons: str = "sum"
  over_layers: str = "mean"
  target_active_fraction: float = 0.05  # of h, mean over layers
  rate: float = 1.2
  # Weights of BlockFFN's two losses, which make tokens near each other share
  # neurons: adjacent tokens, and chunks of `chunk_length`.
  adjacent: float = 0.0
  chunk: float = 0.0
  chunk_length: int = 64

  def __post_init__(self):
    group = "training.penalty"
    check_choice(self.schedule, PENALTY_SCHEDULES, f"{group}.schedule")
    check_choice(self.over_neurons, REDUCTIONS, f"{group}.over_neurons")
    check_choice(self.over_layers, REDUCTIONS, f"{group}.over_layers")
    for name in ("factor", "adjacent", "chunk"):
      check(getattr(self, name) >= 0, f"{group}.{name}",
            f"{getattr(self, name)} must not be negative")
    check(self.factor > 0 or self.schedule != "controller", f"{group}.factor",
          "must be above 0 for the controller, which multiplies it")
    check(self.rate > 1, f"{group}.rate", f"{self.rate} must be above 1")
    check(0 < self.target_active_fraction < 1,
          f"{group}.target_active_fraction",
          f"{self.target_active_fraction} must be in (0, 1)")
    check(self.chunk_length > 1, f"{group}.chunk_length",
          f"{self.chunk_length} must be above 1")
    check(self.factor == 0 or self.schedule in ("constant", "controller"),
          f"{group}.factor", f"schedule={self.schedule} has none; constant and "
          "controller have")
    if self.schedule == "progressive":
      self._check_stages(group)
    else:
      check(not self.peaks and not self.boundaries, f"{group}.peaks",
            "and boundaries are for schedule=progressive")

  def _check_stages(self, group: str) -> None:
    check(len(self.peaks) == len(self.boundaries) > 0, f"{group}.peaks",
          f"{len(self.peaks)} peaks and {len(self.boundaries)} boundaries; "
          "progressive takes one boundary a peak, and at least one")
    check(min(self.peaks) >= 0, f"{group}.peaks",
          f"{min(self.peaks)} must not be negative")
    pairs = zip((0, *self.boundaries), self.boundaries)
    for before, after in pairs:
      check(before < after, f"{group}.boundaries",
            f"{after} does not rise above {before}")


@dataclasses.dataclass(frozen=True)
class DeadNeuronsConfig:
  """Neurons that no longer fire: when one counts as dead, and its repair."""

  # Tokens without a non-zero h after which a neuron is dead; 0: not tracked.
  after_tokens: int = 0
  # Share of a fresh draw that is mixed into a dead neuron's gate weights, each
  # step until it fires ("Sparser, Faster, Lighter": 0.1); 0: none.
  reinitialize: float = 0.0

  def __post_init__(self):
    check(0 <= self.after_tokens < 2**30, "training.dead_neurons.after_tokens",
          f"{self.after_tokens} must be in [0, 2^30)")
    check(0 <= self.reinitialize <= 1, "training.dead_neurons.reinitialize",
          f"{self.reinitialize} must be in [0, 1]")
    check(self.reinitialize == 0 or self.after_tokens > 0,
          "training.dead_neurons.after_tokens",
          "must be above 0 for reinitialize to know which are dead")


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
  # A run's folder whose parameters this run starts from, in place of fresh
  # ones; its checkpoint, 0: the newest. The data go on from there too, where
  # they are the same.
  start_from: str = free("")
  start_step: int = 0
  optimizer: OptimizerConfig = OptimizerConfig()
  penalty: PenaltyConfig = PenaltyConfig()
  dead_neurons: DeadNeuronsConfig = DeadNeuronsConfig()
  mesh: MeshConfig = MeshConfig()
  log_every: int = free(20)  # steps
  eval_every: int = free(200)  # steps; ranks the checkpoint of its step
  eval_batches: int = free(16)  # at most, in an evaluation
  checkpoint_every: int = free(200)  # steps
  # The newest so many, and that of the lowest held-out loss among those saved
  # at a step that evaluates.
  keep_checkpoints: int = free(2)
  keep_steps: tuple[int, ...] = free(())  # and those of these steps, for good

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
    penalty = self.penalty
    check(penalty.schedule != "progressive"
          or penalty.boundaries[-1] <= self.num_steps,
          "training.penalty.boundaries", f"{penalty.boundaries[-1:]} goes past "
          f"num_steps={self.num_steps}")
    check(self.start_step >= 0, "training.start_step",
          f"{self.start_step} must not be negative")
    check(bool(self.start_from) or not self.start_step, "training.start_step",
          "goes with training.start_from")


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
