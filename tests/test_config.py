"""The config: keys, types, checks, overrides."""

import dataclasses
import json
import pathlib
import re
import typing

import pytest

from sparse_lm import cli, config as config_lib
from sparse_lm.config import Config
from sparse_lm.errors import UserError

CONFIGS = sorted(path for path in (
    pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.name != "__init__.py")
SPARK_TINY = next(path for path in CONFIGS if path.stem == "spark_tiny")


def load(*overrides):
  return cli.load_config(str(SPARK_TINY), overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs(path):
  config = cli.load_config(str(path))
  assert config == cli.load_config(path.stem)
  text = path.read_text()
  assert f"--config=configs/{path.name}" in text, "the docstring's command"
  again = config_lib.from_dict(json.loads(config_lib.to_json(config)))
  assert again == config


def test_overrides():
  config = load("--config.model.ffn.active_fraction=0.05",
                "--config.model.scan_layers=true",
                "--config.training.mesh.fsdp=2", "--config.data.path", "here",
                "--config.data.dataset=text_folder",
                "--config.training.optimizer.clip_norm=2")
  assert config.model.ffn.active_fraction == 0.05
  assert config.model.scan_layers is True
  assert config.training.mesh.fsdp == 2
  assert config.data.path == "here"
  assert config.training.optimizer.clip_norm == 2.0
  assert load().model.ffn.active_fraction == 0.08


@pytest.mark.parametrize("flag, message", [
    ("--config.model.ffn.active_fracton=0.1",
     "config.model.ffn.active_fracton: no such key; nearest: "
     "config.model.ffn.active_fraction"),
    ("--config.ffn.num_neurons=3", "nearest: config.model.ffn.num_neurons"),
    ("--config.model=3", "config.model"),
    ("--config.training.num_steps=ten", "config.training.num_steps=ten"),
    ("--config.training.num_steps=1.5", "config.training.num_steps=1.5"),
    ("--config.model.scan_layers=maybe", "config.model.scan_layers=maybe"),
    ("--stesp=3", "--stesp=3: not a flag or a config key"),
    ("--config.model.attention.num_query_heads=4",
     "num_query_heads: 4 is not divisible by num_kv_heads=3"),
    ("--config.model.ffn.predictor_dim=0", "must be in .0, model_dim="),
    ("--config.model.ffn.predictor_dim=100000", "must be in .0, model_dim="),
    ("--config.model.ffn.active_fraction=0", "0.0 must be in .0, 1."),
    ("--config.model.ffn.active_fraction=1.5", "1.5 must be in .0, 1."),
    ("--config.model.ffn.shape=dense", "'dense' is not one of plain, gated"),
    ("--config.training.seed=-1", "seed: -1 must be in"),
    ("--config.training.micro_batches=3", "3 does not divide batch_size"),
    ("--config.training.optimizer.warmup_steps=99999", "go past num_steps"),
    ("--config.data.dataset=text_folder", "config.data.path"),
])
def test_mistakes_are_one_line_that_names_the_key(flag, message):
  overrides = [flag]
  if "num_query_heads" in flag:
    overrides.append("--config.model.attention.num_kv_heads=3")
  with pytest.raises(UserError, match=message) as error:
    load(*overrides)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("source, message", [
    (None, "no such file"),
    ("x = 1\n", "AttributeError"),
    ("import nowhere\n", "No module named 'nowhere'"),
    ("def get_config():\n  pass\n", "returned None, not a Config"),
    ("def get_config(:\n", "SyntaxError"),
    ("from sparse_lm.config import *\n"
     "def get_config():\n  return Config(model=ModelConfig(num_layers=0))\n",
     "config.model.num_layers: 0 must be above 0"),
])
def test_bad_config_files(tmp_path, source, message):
  path = tmp_path / "mine.py"
  if source is not None:
    path.write_text(source)
  with pytest.raises(UserError, match=message):
    cli.load_config(str(path))


def test_unknown_shipped_name():
  with pytest.raises(UserError, match="--config=spark_huge"):
    cli.load_config("spark_huge")


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().training.num_steps = 3


def fields(cls):
  for field in dataclasses.fields(cls):
    yield field
    if dataclasses.is_dataclass(field.type):
      yield from fields(field.type)


def test_every_key_is_a_plain_value_that_a_flag_can_set():
  for field in fields(Config):
    assert (dataclasses.is_dataclass(field.type)
            or field.type in (int, float, str, bool)), field.name
  assert typing.get_type_hints(Config)


def test_an_older_config_json_gets_new_keys_defaults():
  values = config_lib.to_dict(Config())
  del values["model"]["ffn"]["huber_delta"]
  assert config_lib.from_dict(values) == Config()
  values["model"]["ffn"]["num_neurons"] = 3.5
  with pytest.raises(UserError, match="num_neurons: 3.5 is a float, not a int"):
    config_lib.from_dict(values)


def test_no_blank_is_left_to_fill_in():
  root = SPARK_TINY.parents[1]
  for path in (root / "README.md", *CONFIGS):
    assert not re.search(r"@[A-Z0-9]+@", path.read_text()), path
