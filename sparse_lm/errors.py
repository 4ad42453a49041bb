"""The one exception that a command turns into a one-line message."""


class UserError(ValueError):
  """A mistake the user can mend: a wrong key, a missing file, a full disk.

  The message is one line and names the key or the file. Commands print it
  without a traceback and exit with status 2.
  """
