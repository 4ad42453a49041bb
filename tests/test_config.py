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

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in [*FOLDER.glob("*.py"),
                                   *FOLDER.glob("methods/*.py")]
                 if path.name not in ("__init__.py", "base.py"))
SPARK_TINY = next(path for path in CONFIGS if path.stem == "spark_tiny")


def load(*overrides):
  return cli.load_config(str(SPARK_TINY), overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs(path):
  config = cli.load_config(str(path))
  place = path.relative_to(FOLDER)
  assert config == cli.load_config(".".join(place.with_suffix("").parts))
  text = path.read_text()
  assert f"--config=configs/{place}" in text, "the docstring's command"
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


BLOCKS = "ffn.sparsifier=block_topk"
PROGRESSIVE = "training.penalty.schedule=progressive"
RELU = "model.ffn.activation=relu model.ffn.sparsifier=none"


@pytest.mark.parametrize("changes, message", [
    ("model.ffn.shape=plain model.ffn.up_activation=relu",
     "model.ffn.up_activation: relu needs a gate"),
    ("model.ffn.activation=relu model.ffn.threshold=0.1",
     "model.ffn.threshold: only shifted_relu and fatrelu have one"),
    ("model.ffn.activation=fatrelu model.ffn.threshold=-0.1",
     "model.ffn.threshold: -0.1 must not be negative"),
    ("model.ffn.active_fraction=1.01", "model.ffn.active_fraction: 1.01 must"),
    ("model.ffn.active_fraction=0.001",
     "model.ffn.active_fraction: 0.001 of 768 neurons keeps none"),
    ("model.ffn.recall=0", "model.ffn.recall: 0.0 must be in"),
    (f"model.{BLOCKS} model.ffn.active_fraction=0.3",
     "model.ffn.active_fraction: 0.3 of block_size=8 is not a whole number"),
    (f"model.{BLOCKS} model.ffn.active_fraction=0.1",
     "model.ffn.active_fraction: 0.1 of block_size=8 is not a whole number"),
    (f"model.{BLOCKS} model.ffn.active_fraction=0.25 model.ffn.num_neurons=100",
     "model.ffn.num_neurons: 100 is not a multiple of block_size=8"),
    ("model.ffn.block_size=0", "model.ffn.block_size: 0 must be above 0"),
    ("model.linear_inputs.sparsifier=statistical_topk",
     "model.linear_inputs.sparsifier: 'statistical_topk' is not one of"),
    ("model.linear_inputs.active_fraction=1.5",
     "model.linear_inputs.active_fraction: 1.5 must be in"),
    ("model.linear_inputs.sparsifier=topk "
     "model.linear_inputs.active_fraction=0.001",
     "model.linear_inputs.active_fraction: 0.001 of 128 entries keeps none"),
    ("model.linear_inputs.sparsifier=block_topk "
     "model.linear_inputs.active_fraction=0.3",
     "model.linear_inputs.active_fraction: 0.3 of block_size=32 is not"),
    ("model.linear_inputs.sparsifier=block_topk model.model_dim=136 "
     "model.linear_inputs.active_fraction=0.5",
     "model.model_dim: 136 is not a multiple of linear_inputs.block_size=32"),
    ("model.linear_inputs.sparsifier=block_topk "
     "model.linear_inputs.active_fraction=0.5 model.ffn.num_neurons=770",
     "model.ffn.num_neurons: 770 is not a multiple"),
    ("model.linear_inputs.sparsifier=block_topk model.attention.head_dim=40 "
     "model.linear_inputs.active_fraction=0.5",
     "model.attention.num_query_heads x head_dim: 80 is not a multiple"),
    ("model.ffn.sparse_layers=4", "model.ffn.sparse_layers: 4 is not within"),
    ("model.ffn.sparse_layers=0,2-9",
     "model.ffn.sparse_layers: 2-9 is not within num_layers=4"),
    ("model.ffn.sparse_layers=3-1", "model.ffn.sparse_layers: 3-1 runs back"),
    ("model.ffn.sparse_layers=first",
     "model.ffn.sparse_layers: 'first' is neither all nor a list"),
    ("model.ffn.sparse_layers=0,", "model.ffn.sparse_layers: '0,' is neither"),
    ("model.ffn.sparse_layers=-1", "model.ffn.sparse_layers: '-1' is neither"),
    (f"{PROGRESSIVE} training.penalty.peaks=(0.1,0.2) "
     "training.penalty.boundaries=(5,5)",
     "training.penalty.boundaries: 5 does not rise above 5"),
    (f"{PROGRESSIVE} training.penalty.peaks=(0.1,) "
     "training.penalty.boundaries=(0,)",
     "training.penalty.boundaries: 0 does not rise above 0"),
    (f"{PROGRESSIVE} training.penalty.peaks=(0.1,-0.2) "
     "training.penalty.boundaries=(5,9)",
     "training.penalty.peaks: -0.2 must not be negative"),
    (f"{PROGRESSIVE} training.penalty.peaks=(0.1,0.2) "
     "training.penalty.boundaries=(5,1301)",
     "training.penalty.boundaries: .*1301.* goes past num_steps=1300"),
    (f"{PROGRESSIVE} training.penalty.peaks=(0.1,0.2) "
     "training.penalty.boundaries=(5,)",
     "training.penalty.peaks: 2 peaks and 1 boundaries"),
    (PROGRESSIVE, "training.penalty.peaks: 0 peaks and 0 boundaries"),
    ("training.penalty.schedule=controller",
     "training.penalty.factor: must be above 0 for the controller"),
    ("training.penalty.schedule=linear", "training.penalty.schedule: 'linear'"),
    ("training.penalty.factor=0.1",
     "training.penalty.factor: schedule=none has none"),
    ("training.penalty.peaks=(0.1,) training.penalty.boundaries=(9,)",
     "training.penalty.peaks: and boundaries are for schedule=progressive"),
    ("model.ffn.sparsifier=none model.ffn.sparse_layers=0",
     "model.ffn.sparse_layers: there is no model.ffn.sparsifier"),
    ("training.penalty.schedule=controller training.penalty.factor=0.1 "
     "model.ffn.sparsifier=none",
     "training.penalty.schedule: controller: model.ffn.activation=gelu_tanh"),
    ("training.dead_neurons.after_tokens=9 model.ffn.sparsifier=none",
     "training.dead_neurons.after_tokens: model.ffn.activation=gelu_tanh"),
    ("training.penalty.schedule=constant training.penalty.factor=0.1 "
     "model.linear_inputs.sparsifier=topk",
     "training.penalty.schedule: L1 cannot shrink what"),
    ("training.penalty.adjacent=0.1 model.ffn.activation=relu "
     "model.ffn.sparsifier=none model.ffn.up_activation=relu",
     "training.penalty.adjacent: needs .*up_activation=linear"),
    ("training.start_step=3", "training.start_step: goes with"),
    ("training.penalty.factor=-1", "training.penalty.factor: -1.0 must not"),
    ("training.penalty.rate=1", "training.penalty.rate: 1.0 must be above 1"),
    ("training.penalty.target_active_fraction=1",
     "training.penalty.target_active_fraction: 1.0 must be in"),
    ("training.penalty.over_neurons=max", "training.penalty.over_neurons"),
    ("training.penalty.chunk_length=1", "training.penalty.chunk_length: 1"),
    ("training.penalty.adjacent=0.1 model.ffn.sparsifier=none",
     "training.penalty.adjacent: needs model.ffn.activation to be one of relu"),
    ("training.penalty.chunk=0.1 model.ffn.activation=relu",
     "training.penalty.chunk: needs .*sparsifier=none and up_activation"),
    ("training.dead_neurons.reinitialize=0.1",
     "training.dead_neurons.after_tokens: must be above 0"),
    ("training.dead_neurons.after_tokens=-1",
     "training.dead_neurons.after_tokens: -1 must be in"),
    ("training.dead_neurons.after_tokens=9 "
     "training.dead_neurons.reinitialize=2",
     "training.dead_neurons.reinitialize: 2.0 must be in"),
])
def test_mistakes_in_what_makes_it_sparse(changes, message):
  with pytest.raises(UserError, match=f"^config.{message}") as error:
    load(*(f"--config.{change}" for change in changes.split()))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    f"{RELU} training.penalty.adjacent=0.1 training.penalty.chunk=0.1",
    f"{PROGRESSIVE} training.penalty.peaks=(0,0.1) "
    "training.penalty.boundaries=(1,1300)",
    "training.penalty.schedule=controller training.penalty.factor=1e-8",
    "training.dead_neurons.after_tokens=9 training.dead_neurons.reinitialize=1",
    f"model.{BLOCKS} model.ffn.active_fraction=0.25",
    # Floats whose product with the block is not quite whole.
    f"model.{BLOCKS} model.ffn.active_fraction=0.07 model.ffn.block_size=100 "
    "model.ffn.num_neurons=800",
    "model.linear_inputs.sparsifier=block_topk "
    "model.linear_inputs.active_fraction=0.5",
    "model.ffn.activation=relu model.ffn.up_activation=fatrelu "
    "model.ffn.threshold=0.1",
])
def test_what_the_checks_let_through(changes):
  load(*(f"--config.{change}" for change in changes.split()))


@pytest.mark.parametrize("text, expected", [
    ("all", (True, True, True, True)), ("0", (True, False, False, False)),
    ("1-2", (False, True, True, False)), ("0-1,3", (True, True, False, True)),
    ("3,0", (True, False, False, True)), ("0-3", (True,) * 4),
])
def test_sparse_layers(text, expected):
  model = load(f"--config.model.ffn.sparse_layers={text}").model
  assert model.ffn.sparse_layers == text
  assert model.sparse_layers == expected


def test_how_many_are_active():
  model = load("--config.model.ffn.active_fraction=0.1",
               "--config.model.linear_inputs.sparsifier=topk").model
  assert model.ffn.num_active == 77  # of 768
  assert model.linear_inputs.num_active(128) == 77  # 60%
  dense = load("--config.model.ffn.sparsifier=none").model
  assert dense.ffn.num_active == 768
  assert dense.linear_inputs.num_active(128) == 128


def test_lists_by_flags_and_through_json():
  config = load(f"--config.{PROGRESSIVE}",
                "--config.training.penalty.peaks=(0,0.1)",
                "--config.training.penalty.boundaries=(100,200)")
  penalty = config.training.penalty
  assert penalty.peaks == (0.0, 0.1)
  assert type(penalty.peaks[0]) is float
  assert penalty.boundaries == (100, 200)
  again = config_lib.from_dict(json.loads(config_lib.to_json(config)))
  assert again == config
  assert isinstance(again.training.penalty.peaks, tuple)
  one = load(f"--config.{PROGRESSIVE}", "--config.training.penalty.peaks=0.1",
             "--config.training.penalty.boundaries=9")
  assert one.training.penalty.peaks == (0.1,)
  assert config_lib.differences(config, load()) == [
      "training.penalty.schedule", "training.penalty.peaks",
      "training.penalty.boundaries"]


@pytest.mark.parametrize("changes, message", [
    ({"training.penalty.boundaries": (1, 2.5)},
     "training.penalty.boundaries: 2.5 is a float, not a int"),
    ({"training.penalty.peaks": ["much"]},
     "training.penalty.peaks: 'much' is a str, not a float"),
    ({"training.penalty.peaks": 0.1},
     "training.penalty.peaks: 0.1 is not a list"),
])
def test_lists_are_type_checked(changes, message):
  with pytest.raises(UserError, match=f"^config.{message}"):
    config_lib.replace(Config(), **changes)


@pytest.mark.parametrize("flag", [
    "--config.training.penalty.peaks=much",
    "--config.training.penalty.boundaries=(1,2.5)",
])
def test_lists_by_flags_are_type_checked(flag):
  with pytest.raises(UserError, match="penalty.(peaks|boundaries)") as error:
    load(flag)
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
            or field.type in (int, float, str, bool, tuple[int, ...],
                              tuple[float, ...])), field.name
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
