"""Spark Transformer at the shapes of Gemma-2 2B, for a pod.

What: 26 layers, D 2304, 8 query and 4 key/value heads of 256, 13,824 neurons of
which 8% are active (R 1,024), 256 keys per query (128 predictor dims), sliding
window 4,096 on every other layer, soft-caps 50 and 30, vocabulary 256,000:
2.61B parameters, as many as gemma2_2b.
Paper: Spark Transformer, arXiv 2506.06644, Section 4; its 480k steps of 4.2M
tokens are kept. The data are C4 and a BPE tokenizer trained on it, since the
paper's are not public.

  python -m sparse_lm.train --config=configs/spark_2b.py --workdir=<a folder all hosts see>

on every host of a TPU v5e:16x16 (256 chips), once TFDS has prepared C4 as
ArrayRecord there (which takes Apache Beam). Compiled for that topology, not
run: 7.7 GB of a chip's 16 GB (state 2.0, temporaries 5.7), by
tests/test_tpu_compile.py, jax 0.10.2, 2026-11-22. Time and result: not measured.
"""

from sparse_lm.config import (AttentionConfig, Config, DataConfig, FFNConfig,
                              MeshConfig, ModelConfig, OptimizerConfig,
                              TrainingConfig)


def get_config() -> Config:
  return Config(
      model=ModelConfig(
          vocab_size=256_000,
          context_length=8192,
          num_layers=26,
          model_dim=2304,
          ffn=FFNConfig(shape="spark", num_neurons=13_824, predictor_dim=1024,
                        sparsifier="statistical_topk", active_fraction=0.08),
          attention=AttentionConfig(
              shape="spark", num_query_heads=8, num_kv_heads=4, head_dim=256,
              predictor_dim=128, top_k=256, sliding_window=4096,
              global_every=2, logit_softcap=50.0, query_chunk=512),
          final_logit_softcap=30.0,
          scan_layers=True,
          remat="block"),
      data=DataConfig(dataset="c4", tokenizer="bpe", shuffle_window=256,
                      num_workers=16),
      training=TrainingConfig(
          num_steps=480_000, batch_size=512, loss_chunk=512,
          optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2000),
          mesh=MeshConfig(data=-1, fsdp=16),
          log_every=50, eval_every=5000, eval_batches=32,
          checkpoint_every=1000, keep_checkpoints=3))
