"""Programs for TPUs, compiled with no TPU at hand."""

import json
import math

import pytest

HBM = 15.75e9  # of a v5e chip's 16 GB, what libtpu lets a program use

SCRIPT = r"""
import json, re, time
from sparse_lm.configs import spark_2b
from sparse_lm.model import ffn
from sparse_lm.training import aot

ffn.gated_topk = None  # Not for TPUs, whatever this machine has.
config = spark_2b.get_config()
lowered = aot.lower_train_step(config, aot.tpu_devices("v5e:16x16"))
start = time.perf_counter()
compiled = lowered.compile()
print(json.dumps(dict(
    aot.bytes_per_chip(compiled), seconds=time.perf_counter() - start,
    shapes=sorted(set(re.findall(r"\w+\[[\d,]+\]", compiled.as_text()))))))
"""


@pytest.mark.tpu_compile
def test_the_2b_training_step_fits_a_v5e_pod(run_with_libtpu):
  report = json.loads(run_with_libtpu(SCRIPT))
  shapes = report.pop("shapes")
  print(json.dumps(report))
  assert report["total"] < HBM
  # A Spark 2B has 2.6e9 parameters; with AdamW 12 bytes each, 16 shards. All
  # of it is donated: only the batch is an argument and no more.
  assert report["donated"] > 2.6e9 * 12 / 16
  assert report["donated"] > 0.999 * report["arguments"]
  # No chip ever holds the whole embedding, all layers' weights of a kind, or
  # one layer's activations of more than its own two sequences.
  dims = [[int(d) for d in shape.split("[")[1][:-1].split(",")]
          for shape in shapes]
  assert [256_000, 144] in dims and [26, 13_824, 144] in dims
  assert [256_000, 2304] not in dims
  assert not any(d[0] == 26 and 13_824 in d and (2304 in d or 1280 in d)
                 for d in dims)
  assert not any(8192 in d and 13_824 in d and math.prod(d) > 2 * 8192 * 13_824
                 for d in dims)


ATTENTION = r"""
import sys
import jax
import jax.numpy as jnp
from sparse_lm.kernels.sparse_attention import sparse_attention
from sparse_lm.training import aot

sharding = jax.sharding.SingleDeviceSharding(aot.tpu_devices(sys.argv[1])[0])


@jax.jit
def attend(query, key1, key2, value, lengths, window):
  return sparse_attention(query, key1, key2, value, lengths, window=window,
                          top_k=256, logit_softcap=50.,
                          implementation="pallas_tpu")


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


for b, k, g, s, dtype in [(4, 4, 2, 8192, jnp.bfloat16),
                          (1, 1, 1, 256, jnp.float32)]:
  cache = [array(b, k, s, e, dtype=dtype) for e in (128, 128, 256)]
  compiled = attend.lower(
      array(b, k, g, 256, dtype=dtype), *cache, array(b, dtype=jnp.int32),
      array(dtype=jnp.int32)).compile()
  assert "sparse_attention" in compiled.as_text()
  # No copy of a cache's part beside it.
  assert compiled.memory_analysis().temp_size_in_bytes < 2**20
print("compiled")
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_the_sparse_attention_kernel_compiles(topology, run_with_libtpu):
  assert run_with_libtpu(ATTENTION, topology) == "compiled"
