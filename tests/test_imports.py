"""What may be imported where."""

import subprocess
import sys

BLOCKED = ("grain", "tensorflow_datasets", "ml_collections", "tensorflow")


def test_model_and_decoding_need_no_data_library():
  """A machine with jax and flax alone can load and run a model."""
  code = "import sys\n" + "".join(
      f"sys.modules[{name!r}] = None\n" for name in BLOCKED)
  code += ("import sparse_lm.model, sparse_lm.decoding, sparse_lm.flops\n"
           "import sparse_lm.training.step, sparse_lm.configs.spark_tiny\n"
           "import sparse_lm.benchmark, sparse_lm.decoding.timing\n"
           "import sparse_lm.training.timing\n")
  result = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          text=True, check=False)
  assert result.returncode == 0, result.stderr


def test_importing_touches_no_device_and_joins_no_cluster():
  code = ("import sparse_lm.train, sparse_lm.evaluate, sparse_lm.generate\n"
          "import sparse_lm.training.loop\n"
          "import jax\n"
          "from jax._src import xla_bridge\n"
          "assert not jax.distributed.is_initialized()\n"
          "assert not xla_bridge.backends_are_initialized()\n")
  result = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          text=True, check=False)
  assert result.returncode == 0, result.stderr
