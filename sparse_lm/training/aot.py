"""Ahead-of-time compilation: does a config fit a TPU pod, asked without one.

`libtpu` is XLA's compiler for TPUs and needs no TPU to compile. Get it with
`pip install --target <folder> libtpu`, point the environment variable
TPU_LIBRARY_PATH to `<folder>/libtpu/libtpu.so`, and:

    from sparse_lm.configs import spark_2b
    from sparse_lm.training import aot
    print(aot.compile_for_topology(spark_2b.get_config(), "v5e:16x16"))

A plain `pip install libtpu` works too, but then every program that imports jax
on this machine looks for a TPU first.
"""

from collections.abc import Sequence
import importlib.util
import os

import jax
from jax.experimental import topologies
import numpy as np

from sparse_lm.config import Config, replace
from sparse_lm.errors import UserError
from sparse_lm.training import mesh as mesh_lib
from sparse_lm.training import program

# What libtpu would ask a TPU's host about.
_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # No TPU is held: no lock is needed.
}


def tpu_devices(topology: str) -> Sequence[jax.Device]:
  """Devices to compile for, of a topology such as "v5e:16x16" (256 chips).

  Raises:
    UserError: where libtpu is missing or does not know the topology.
  """
  if not (os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", ""))
          or importlib.util.find_spec("libtpu")):
    raise UserError("libtpu was not found: pip install --target <folder> "
                    "libtpu, and set TPU_LIBRARY_PATH to "
                    "<folder>/libtpu/libtpu.so")
  for name, value in _HOST.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(topology, "tpu").devices
  except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
    raise UserError(f"topology {topology!r}: {str(e).splitlines()[0]}") from e


def lower_train_step(config: Config,
                     devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """The training step, lowered for `devices`.

  `compute_dtype=auto` is taken as bfloat16: it is the backend of this machine
  that it would look at.
  """
  if config.model.compute_dtype == "auto":
    config = replace(config, **{"model.compute_dtype": "bfloat16"})
  return program.lower_train_step(
      config, mesh_lib.make_mesh(config, devices),
      np.zeros(config.model.vocab_size, np.float32))


def bytes_per_chip(compiled: jax.stages.Compiled) -> dict[str, int]:
  """What a compiled step holds in each chip's memory.

  Returns:
    `arguments` (state and batch), `outputs`, `donated` (outputs that take the
    arguments' place), `temporaries`, and `total`, which counts the donated
    bytes once.
  """
  memory = compiled.memory_analysis()
  sizes = dict(arguments=memory.argument_size_in_bytes,
               outputs=memory.output_size_in_bytes,
               donated=memory.alias_size_in_bytes,
               temporaries=memory.temp_size_in_bytes)
  return dict(sizes, total=sum(sizes.values()) - 2 * sizes["donated"])


def compile_for_topology(config: Config, topology: str) -> dict[str, int]:
  """Compiles the training step of a config for a TPU pod: minutes.

  Args:
    config: the experiment.
    topology: a TPU generation and shape, such as "v5e:16x16" or "v5p:8x8x8".

  Returns:
    `bytes_per_chip` of the step.

  Raises:
    UserError: where the mesh does not fit the topology, or libtpu is missing.
    jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED where the step needs more
      memory than a chip has.
  """
  return bytes_per_chip(
      lower_train_step(config, tpu_devices(topology)).compile())
