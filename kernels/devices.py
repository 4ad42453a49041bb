"""What a device is."""

import jax


def is_hopper(device: jax.Device) -> bool:
  """Whether it is an NVIDIA GPU of compute capability 9.

  What the GPU kernels are made of, Blackwell has not, or has not run.
  """
  capability = str(getattr(device, "compute_capability", ""))
  return device.platform == "gpu" and capability.split(".")[0] == "9"


def unserved(device: jax.Device, implementation: str) -> str | None:
  """Why a device cannot run an operation's implementation, None where it can.

  Args:
    device: what it would run on.
    implementation: its name.
  """
  if implementation == "pallas_gpu" and not is_hopper(device):
    return f"needs an NVIDIA Hopper GPU, not {device.device_kind}"
  if implementation == "pallas_tpu" and device.platform != "tpu":
    return f"needs a TPU, not {device.device_kind}"
  return None
