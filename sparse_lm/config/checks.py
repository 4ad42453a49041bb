"""What the fields of a config share: marks and checks."""

import dataclasses

from sparse_lm.errors import UserError


def free(default):
  """A field that a resumed run may set differently from the first one."""
  return dataclasses.field(default=default, metadata={"free": True})


def check(ok: bool, key: str, message: str) -> None:
  """Raises a `UserError` that names `config.<key>` unless `ok`."""
  if not ok:
    raise UserError(f"config.{key}: {message}")


def check_choice(value: str, choices: tuple[str, ...], key: str) -> None:
  check(value in choices, key,
        f"{value!r} is not one of {', '.join(choices)}")
