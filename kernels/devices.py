"""What a device is."""

import jax


def generation(device: jax.Device) -> int:
  """Of an NVIDIA GPU, 9 for Hopper; 0 for other devices."""
  capability = str(getattr(device, "compute_capability", ""))
  major = capability.split(".")[0]
  return int(major) if device.platform == "gpu" and major.isdigit() else 0
