"""The suite runs on a CPU that shows itself as eight devices."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# A program that is compiled again, here or in a subprocess, is read from here.
COMPILED = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # pylint: disable=g-import-not-at-top

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of the suite's time. The commands, which run as
# subprocesses, are compiled as users have them.
jax.config.update("jax_disable_most_optimizations", True)

import importlib.util  # pylint: disable=g-import-not-at-top
import pathlib
import random
import subprocess
import sys

import pytest

from sparse_lm import cli, config as config_lib

TINY = pathlib.Path(__file__).with_name("tiny.py")
LIBTPU = (pathlib.Path(__file__).parents[1]
          / ".venv" / "libtpu" / "libtpu" / "libtpu.so")


@pytest.fixture(scope="session", autouse=True)
def gpu_instructions():
  """Teaches GPU interpret mode instructions that kernels use."""
  if jax.__version_info__ < (0, 12):  # It has no clusters.
    yield
    return
  import gpu_instructions as instructions  # pylint: disable=g-import-not-at-top
  with instructions.interpreted():
    yield


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
  """Thirty short documents of made-up words."""
  folder = tmp_path_factory.mktemp("corpus")
  draw = random.Random(0)
  words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6)))
           for _ in range(40)]
  for i in range(30):
    text = " ".join(draw.choices(words, k=draw.randint(40, 400)))
    (folder / f"{i}.txt").write_text(f"the {text}.\n")
  return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
  """Where prepared data are kept, for the whole session."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_flags(corpus_folder, cache_folder):
  """The flags that make the tiny experiment."""
  return [f"--config={TINY}", f"--config.data.path={corpus_folder}",
          f"--config.data.cache_dir={cache_folder}"]


@pytest.fixture(scope="session")
def tiny_config(tiny_flags):
  """The tiny experiment, with keys changed: `tiny_config(**{"a.b": 1})`."""
  config = cli.load_config(tiny_flags[0].removeprefix("--config="),
                           tiny_flags[1:])
  return lambda **changes: config_lib.replace(config, **changes)


@pytest.fixture(scope="session")
def run_with_libtpu():
  """Runs a script that compiles for TPUs: its last line; skips where it can't.

  In a process of its own: libtpu is loaded, and jax flags are those of a user.
  """
  env = dict(os.environ, JAX_PLATFORMS="cpu")
  if not os.path.isfile(env.get("TPU_LIBRARY_PATH", "")):
    env.pop("TPU_LIBRARY_PATH", None)
    if LIBTPU.is_file():
      env["TPU_LIBRARY_PATH"] = str(LIBTPU)
    elif not importlib.util.find_spec("libtpu"):
      pytest.skip("no libtpu: pip install --target .venv/libtpu libtpu "
                  "(Linux on x86-64 alone)")

  def run(script, *arguments):
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env,
        capture_output=True, text=True, timeout=1800, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout.splitlines()[-1]

  return run
