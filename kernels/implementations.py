"""An operation's implementations, by name."""

from collections.abc import Callable
import importlib
from types import ModuleType


def loader(operation: str, modules: dict[str, str]
           ) -> Callable[[str], ModuleType]:
  """A function from an implementation's name to its module.

  Lazy: Pallas takes a while to import. On a name that is not there it raises
  `ValueError`.

  Args:
    operation: its folder beside this file.
    modules: in that folder, by the implementation's name.
  """
  def load(implementation: str) -> ModuleType:
    if implementation not in modules:
      raise ValueError(f"implementation={implementation!r} is not one of "
                       f"{', '.join(modules)}")
    return importlib.import_module(
        f"sparse_lm.kernels.{operation}.{modules[implementation]}")

  return load
