"""The suite runs on a CPU that shows itself as eight devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # pylint: disable=g-import-not-at-top

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of the suite's time. The commands, which run as
# subprocesses, are compiled as users have them.
jax.config.update("jax_disable_most_optimizations", True)
