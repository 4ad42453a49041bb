"""Benchmarks of training's parts, at sizes that only show that they run."""

from sparse_lm.training import timing


def test_attention():
  result = timing.time_attention([16], [(8, 16)], query_heads=2, kv_heads=1,
                                 head_dim=8)
  assert [(row["tokens"], row["attention"]) for row in result["rows"]] == [
      (16, "dense"), (16, "spark_materialised"), (16, "spark_8x16")]
  for row in result["rows"]:
    assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["both_MB"] > 0
