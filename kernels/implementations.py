"""An operation's implementations, by name."""

from collections.abc import Iterator
import importlib
from types import ModuleType

import jax

from sparse_lm.kernels import devices


def check_shapes(*arrays: tuple[str, jax.Array, tuple[int, ...]]) -> None:
  """Raises `ValueError` unless each, by name, has the shape beside it."""
  for name, array, shape in arrays:
    if array.shape != shape:
      raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


class Implementations:
  """Modules that do the same, by name; iterating over it gives the names."""

  def __init__(self, operation: str, modules: dict[str, str]):
    """Imports nothing yet: Pallas takes a while to import.

    Args:
      operation: its folder beside this file.
      modules: in that folder, by the implementation's name.
    """
    self._operation, self._modules = operation, modules

  def __iter__(self) -> Iterator[str]:
    return iter(self._modules)

  def __getitem__(self, name: str) -> ModuleType:
    """An implementation's module; `ValueError` where there is none."""
    if name not in self._modules:
      raise ValueError(f"implementation={name!r} is not one of "
                       f"{', '.join(self)}")
    return importlib.import_module(
        f"sparse_lm.kernels.{self._operation}.{self._modules[name]}")

  def unsupported(self, name: str, *arguments) -> str | None:
    """Why an implementation cannot take such arguments, None where it can.

    Args:
      name: the implementation's.
      *arguments: of its module's `unsupported`; one that has none takes all.

    Raises:
      ValueError: on an unknown implementation.
    """
    check = getattr(self[name], "unsupported", None)
    return check and check(*arguments)

  def serving(self, name: str, *arguments) -> ModuleType:
    """An implementation's module, if it can take such arguments here.

    A CPU may interpret any, and compile it for a machine that has what it runs
    on; other devices must be what it runs on.

    Raises:
      ValueError: on an unknown implementation, or one that cannot.
    """
    device, reason = jax.devices()[0], self.unsupported(name, *arguments)
    if not reason and device.platform != "cpu":
      reason = devices.unserved(device, name)
    if reason:
      raise ValueError(f"implementation={name!r}: {reason}")
    return self[name]
