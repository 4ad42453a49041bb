"""The keys of `config.model`: what the network computes."""

import dataclasses
import re

from sparse_lm.config.checks import check, check_choice, free

FFN_SHAPES = ("plain", "gated", "spark")
ACTIVATIONS = ("relu", "relu2", "shifted_relu", "fatrelu", "silu", "gelu",
               "gelu_tanh")
WITH_THRESHOLD = ("shifted_relu", "fatrelu")  # those that read `threshold`
# Those whose output is zero wherever their input is below a threshold.
RELU_FAMILY = ("relu", "relu2", *WITH_THRESHOLD)
SPARSIFIERS = ("none", "statistical_topk", "topk", "approx_topk", "block_topk")
INPUT_SPARSIFIERS = ("none", "topk", "block_topk")
ATTENTION_SHAPES = ("dense", "spark")
REMAT = ("none", "block")
DTYPES = ("auto", "float32", "bfloat16")


def _check_topk(active_fraction: float, sparsifier: str, block_size: int,
                group: str) -> None:
  """That the kept fraction is one, and of a block a whole number."""
  check(0 < active_fraction <= 1, f"{group}.active_fraction",
        f"{active_fraction} must be in (0, 1]")
  check(block_size > 0, f"{group}.block_size", f"{block_size} must be above 0")
  if sparsifier == "block_topk":
    kept = active_fraction * block_size
    check(kept >= 1 and abs(kept - round(kept)) < 1e-6,
          f"{group}.active_fraction", f"{active_fraction} of "
          f"block_size={block_size} is not a whole number of entries")


@dataclasses.dataclass(frozen=True)
class FFNConfig:
  """A feed-forward layer: shape x activation x sparsifier."""

  # plain: down(act(up x)). gated: down(act(gate x) * (up x)).
  # spark: the first R input dims predict, the other D-R gate; no more
  # parameters than plain.
  shape: str = "spark"
  num_neurons: int = 1024  # F
  activation: str = "gelu_tanh"  # see model/activations.py
  # Of the other branch, gated and spark only. dReLU has relu on both.
  up_activation: str = "linear"
  # What shifted_relu subtracts; what fatrelu's survivors reach.
  threshold: float = 0.0
  # Applied to what enters the activation (the predictor's or gate's output).
  sparsifier: str = "statistical_topk"
  active_fraction: float = 0.08  # k / F, the fraction the sparsifier keeps
  # The layers that have the sparsifier: all, or numbers and ranges such as
  # 0-9,12 (from 0, ends included).
  sparse_layers: str = "all"
  block_size: int = 8  # block_topk only: it keeps active_fraction of each block
  recall: float = 0.95  # approx_topk only: of the true top k, expected
  predictor_dim: int = 128  # R, spark only: input dims that predict
  bessel: bool = False  # std over F-1 (True) or over F (False)
  huber_delta: float = 0.0  # width of the smoothed corner; 0: a plain corner

  def __post_init__(self):
    check_choice(self.shape, FFN_SHAPES, "model.ffn.shape")
    check_choice(self.activation, ACTIVATIONS, "model.ffn.activation")
    check_choice(self.up_activation, ("linear", *ACTIVATIONS),
                 "model.ffn.up_activation")
    check_choice(self.sparsifier, SPARSIFIERS, "model.ffn.sparsifier")
    check(self.up_activation == "linear" or self.shape != "plain",
          "model.ffn.up_activation", f"{self.up_activation} needs a gate: "
          "model.ffn.shape=gated or spark")
    check(self.threshold >= 0, "model.ffn.threshold",
          f"{self.threshold} must not be negative")
    check(self.threshold == 0
          or self.activation in WITH_THRESHOLD
          or self.up_activation in WITH_THRESHOLD,
          "model.ffn.threshold", "only shifted_relu and fatrelu have one")
    check(self.num_neurons > 0, "model.ffn.num_neurons",
          f"{self.num_neurons} must be above 0")
    _check_topk(self.active_fraction, self.sparsifier, self.block_size,
                "model.ffn")
    check(self.active_fraction * self.num_neurons >= 1,
          "model.ffn.active_fraction",
          f"{self.active_fraction} of {self.num_neurons} neurons keeps none")
    check(self.sparsifier != "block_topk"
          or self.num_neurons % self.block_size == 0, "model.ffn.num_neurons",
          f"{self.num_neurons} is not a multiple of "
          f"block_size={self.block_size}")
    check(0 < self.recall <= 1, "model.ffn.recall",
          f"{self.recall} must be in (0, 1]")
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
class LinearInputsConfig:
  """What the blocks' linear maps see of their inputs (Q-Sparse).

  It concerns the inputs of query, key, value and output, of gate, up and down.
  """

  sparsifier: str = "none"  # of an input's entries, by magnitude
  active_fraction: float = 0.6  # the fraction of an input that is kept
  block_size: int = 32  # block_topk only: it keeps active_fraction of each
  rescale: bool = True  # divide what is kept by its root mean square
  # The dropped entries' gradients pass as if they had been kept.
  straight_through: bool = True

  def __post_init__(self):
    check_choice(self.sparsifier, INPUT_SPARSIFIERS,
                 "model.linear_inputs.sparsifier")
    _check_topk(self.active_fraction, self.sparsifier, self.block_size,
                "model.linear_inputs")

  def num_active(self, width: int) -> int:
    """How many of an input's `width` entries are kept."""
    if self.sparsifier == "none":
      return width
    return round(self.active_fraction * width)


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
  # Queries scored against the keys at a time, in Spark attention of whole
  # sequences against as many keys at a time; 0: all at once. With it memory is
  # linear in the sequence's length. It never changes the result.
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
  linear_inputs: LinearInputsConfig = LinearInputsConfig()
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
    self._check_linear_inputs()
    _ = self.sparse_layers  # Raises where it cannot be read.

  def _check_linear_inputs(self) -> None:
    inputs = self.linear_inputs
    widths = {"model.model_dim": self.model_dim,
              "model.attention.num_query_heads x head_dim":
                  self.attention.num_query_heads * self.attention.head_dim,
              "model.ffn.num_neurons": self.ffn.num_neurons}
    for key, width in widths.items():
      check(inputs.sparsifier != "block_topk" or width % inputs.block_size == 0,
            key, f"{width} is not a multiple of "
            f"linear_inputs.block_size={inputs.block_size}")
      check(inputs.num_active(width) > 0, "model.linear_inputs.active_fraction",
            f"{inputs.active_fraction} of {width} entries keeps none")

  @property
  def sparse_layers(self) -> tuple[bool, ...]:
    """Which of the N layers have the FFN's sparsifier.

    Raises:
      UserError: where `ffn.sparse_layers` names none or cannot be read.
    """
    text, key = self.ffn.sparse_layers, "model.ffn.sparse_layers"
    if text == "all":
      return (True,) * self.num_layers
    check(self.ffn.sparsifier != "none", key,
          "there is no model.ffn.sparsifier")
    chosen = set()
    for part in text.split(","):
      match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
      check(match is not None, key, f"{text!r} is neither all nor a list such "
            "as 0-9,12")
      first, last = int(match[1]), int(match[2] or match[1])
      check(first <= last, key, f"{part.strip()} runs backwards")
      check(last < self.num_layers, key, f"{part.strip()} is not within "
            f"num_layers={self.num_layers}, from 0")
      chosen |= set(range(first, last + 1))
    return tuple(i in chosen for i in range(self.num_layers))
