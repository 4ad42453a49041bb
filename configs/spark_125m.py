"""A 125M-parameter Spark Transformer, for one GPU."""

from sparse_lm.config import (AttentionConfig, Config, DataConfig, FFNConfig,
                              ModelConfig, OptimizerConfig, TrainingConfig)


def get_config() -> Config:
  return Config(
      model=ModelConfig(
          vocab_size=32_768,
          context_length=1024,
          num_layers=12,
          model_dim=768,
          ffn=FFNConfig(shape="spark", num_neurons=3072 * 3 // 2,
                        predictor_dim=384, sparsifier="statistical_topk",
                        active_fraction=0.08),
          attention=AttentionConfig(
              shape="spark", num_query_heads=12, num_kv_heads=4, head_dim=64,
              predictor_dim=32, top_k=256),
          scan_layers=True,
          remat="block"),
      data=DataConfig(dataset="python_source/environment", tokenizer="bpe",
                      shuffle_window=4096, num_workers=8),
      training=TrainingConfig(
          num_steps=20_000, batch_size=128, micro_batches=4,
          optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
          log_every=50, eval_every=1000, eval_batches=32,
          checkpoint_every=1000))
