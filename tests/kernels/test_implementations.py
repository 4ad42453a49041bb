"""What runs an operation, and what says that it cannot."""

import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from sparse_lm.kernels import (add_norm, dense_attention, spark_attention,
                               sparse_attention, sparse_ffn, statistical_topk)
from sparse_lm.kernels.devices import unserved

OPERATIONS = [add_norm, dense_attention, spark_attention, sparse_attention,
              sparse_ffn, statistical_topk]


def make_device(platform, capability=""):
  return types.SimpleNamespace(
      platform=platform, compute_capability=capability,
      device_kind=f"{platform}{capability}")


CPU, TPU, HOPPER = make_device("cpu"), make_device("tpu"), make_device(
    "gpu", "9.0")
BLACKWELL, AMD = make_device("gpu", "10.0"), make_device("gpu", "gfx90a")


@pytest.mark.parametrize("name, devices", [
    ("pallas_gpu", [HOPPER]), ("pallas_tpu", [TPU]),
    ("xla", [CPU, TPU, HOPPER, BLACKWELL, AMD]),
    ("reference", [CPU, TPU, HOPPER, BLACKWELL, AMD])])
def test_what_a_device_runs(name, devices):
  for device in (CPU, TPU, HOPPER, BLACKWELL, AMD):
    reason = unserved(device, name)
    assert reason is None if device in devices else (
        "needs a" in reason and f"not {device.device_kind}" in reason)


def ffn_of_zeros(implementation, neurons=256):
  shapes = (1, 512), (neurons, 256), (neurons, 256), (neurons, 512)
  return jax.eval_shape(
      functools.partial(sparse_ffn.sparse_ffn, select=jax.nn.relu,
                        implementation=implementation),
      *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))


@pytest.mark.parametrize("device, name, message", [
    (TPU, "pallas_gpu", "'pallas_gpu': needs an NVIDIA Hopper GPU, not tpu"),
    (BLACKWELL, "pallas_gpu", "'pallas_gpu': needs an NVIDIA Hopper GPU"),
    (HOPPER, "pallas_tpu", "'pallas_tpu': needs a TPU, not gpu9.0")])
def test_another_machines_kernel_is_refused(monkeypatch, device, name, message):
  """But by a CPU, which may interpret it or compile it for that machine."""
  ffn_of_zeros(name)
  monkeypatch.setattr(jax, "devices", lambda: [device])
  with pytest.raises(ValueError, match=message):
    ffn_of_zeros(name)


@pytest.mark.parametrize("operation", OPERATIONS,
                         ids=lambda module: module.__name__.split(".")[-1])
def test_an_unknown_name_is_refused(operation):
  names = list(operation.IMPLEMENTATIONS)
  assert "pallas_gpu" in names and {"xla", "reference"} & set(names)
  with pytest.raises(ValueError, match=f"'cuda' is not one of {names[0]}, "):
    operation.IMPLEMENTATIONS.unsupported("cuda")


def test_kernels_are_imported_when_they_are_wanted():
  code = ("import sys, sparse_lm.model, sparse_lm.decoding\n"
          "assert not [name for name in sys.modules if 'mosaic' in name\n"
          "            and name.startswith('jax.experimental.pallas')]\n")
  result = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          text=True, check=False)
  assert result.returncode == 0, result.stderr
