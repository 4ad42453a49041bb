"""Benchmarks of training's parts, at sizes that only show that they run."""

from sparse_lm.training import timing


def test_attention():
  result = timing.time_attention([16], [(8, 16)], query_heads=2, kv_heads=1,
                                 head_dim=8)
  assert [(row["tokens"], row["attention"]) for row in result["rows"]] == [
      (16, "dense"), (16, "spark_materialised"), (16, "spark_8x16")]
  for row in result["rows"]:
    assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["both_MB"] > 0
  assert "spark_8x16" in timing.table(result)


def test_topk():
  result = timing.time_topk(8, 16, 64, 4)
  assert result["rows"][0] | dict(ms=0, MB=0) == dict(
      topk="none", ms=0, ratio=1.0, MB=0)
  assert [row["topk"] for row in result["rows"]][1:] == [
      "statistical", "top_k", "approx_max_k", "gated_xla"]
