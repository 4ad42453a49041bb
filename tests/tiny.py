"""The smallest experiment that has every part: seconds on a CPU."""

from sparse_lm.config import (AttentionConfig, Config, DataConfig, FFNConfig,
                              ModelConfig, OptimizerConfig, SampleConfig,
                              TrainingConfig)


def get_config() -> Config:
  return Config(
      model=ModelConfig(
          vocab_size=257, context_length=32, num_layers=2, model_dim=32,
          ffn=FFNConfig(num_neurons=64, predictor_dim=16, active_fraction=0.1),
          attention=AttentionConfig(
              num_query_heads=4, num_kv_heads=2, head_dim=8, predictor_dim=4,
              top_k=8, sliding_window=16)),
      # Tests override the path.
      data=DataConfig(dataset="text_folder", path="corpus", tokenizer="bytes",
                      shuffle_window=8),
      training=TrainingConfig(
          num_steps=12, batch_size=8, log_every=2, eval_every=6,
          eval_batches=2, checkpoint_every=4,
          optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2)),
      sample=SampleConfig(prompt="the ", max_new_tokens=8))
