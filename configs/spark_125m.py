"""A Spark Transformer of 129M parameters, for one GPU.

What: 12 layers, D 768, 12 query and 4 key/value heads of 64, 4,608 neurons of
which 8% are active, 256 keys per query, vocabulary 32,768; on every .py file
that the interpreter can import (hundreds of MB where PyTorch is installed).

  python -m sparse_lm.train --config=configs/spark_125m.py --workdir=runs/spark_125m

Hardware: one NVIDIA H200, jax 0.11.2, 2026-11-22: 97k tokens/s (MFU 8%), 11 GB
of temporaries, 32 s to compile. Its dense twin (gated, 3,072 neurons, dense
attention) trains at 187k tokens/s: Spark attention has no fused kernel yet.
At that rate the 20,000 steps of 131k tokens are 7.5 hours; they have not been
run to the end. Over steps 61 to 80 of a run cut short the training loss was 4.48
(dense: 4.58; one seed).
"""

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
