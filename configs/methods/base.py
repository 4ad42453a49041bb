"""What the methods share: two sizes of a dense model, its data, its training.

tiny: 1.25M parameters (1.0M without the embedding), 0.3M tokens, about a minute
on 2 CPU cores; on the standard library's source.
small: 33.6M parameters (25.2M without the embedding), for one GPU; on every .py
file that the interpreter can import.
"""

from typing import Any

from sparse_lm import config as config_lib
from sparse_lm.config import (AttentionConfig, Config, DataConfig, FFNConfig,
                              ModelConfig, OptimizerConfig, TrainingConfig)
from sparse_lm.errors import UserError


def _tiny() -> Config:
  return Config(
      model=ModelConfig(
          vocab_size=2048, context_length=256, num_layers=4, model_dim=128,
          ffn=FFNConfig(shape="gated", num_neurons=512, sparsifier="none",
                        predictor_dim=64),
          attention=AttentionConfig(
              shape="dense", num_query_heads=2, num_kv_heads=1, head_dim=64,
              predictor_dim=32, top_k=32)),
      data=DataConfig(dataset="python_source/stdlib", shuffle_window=4096),
      training=TrainingConfig(
          num_steps=300, batch_size=4, log_every=50, eval_every=150,
          checkpoint_every=150,
          optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50)))


def _small() -> Config:
  return Config(
      model=ModelConfig(
          vocab_size=16_384, context_length=1024, num_layers=8, model_dim=512,
          ffn=FFNConfig(shape="gated", num_neurons=1536, sparsifier="none",
                        predictor_dim=256),
          attention=AttentionConfig(
              shape="dense", num_query_heads=8, num_kv_heads=4, head_dim=64,
              predictor_dim=32, top_k=128),
          scan_layers=True),
      data=DataConfig(dataset="python_source/environment",
                      shuffle_window=4096, num_workers=8),
      training=TrainingConfig(
          num_steps=800, batch_size=32, loss_chunk=256, log_every=50,
          eval_every=400, eval_batches=16, checkpoint_every=400,
          optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100)))


SIZES = {"tiny": _tiny, "small": _small}


def make(size: str, **changes: Any) -> Config:
  """The dense model of a size with keys changed, parameters kept.

  A gated layer has three matrices, a plain or Spark one as much as two: those
  get half as many neurons again.

  Raises:
    UserError: on an unknown size or key.
  """
  if size not in SIZES:
    raise UserError(f"size {size!r} is not one of {', '.join(SIZES)}")
  config = SIZES[size]()
  if changes.get("model.ffn.shape", "gated") != "gated":
    changes["model.ffn.num_neurons"] = config.model.ffn.num_neurons * 3 // 2
  return config_lib.replace(config, **changes)
