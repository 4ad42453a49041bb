"""The commands: what they print, write and refuse.

Each runs as a subprocess. What one does after another has shown that it starts
runs in this process: `main` is all that `cli.run` calls.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from sparse_lm import (benchmark, compare, evaluate, generate, shift_threshold,
                       train)
from sparse_lm.config import FFNConfig
from sparse_lm.decoding import timing
from sparse_lm.errors import UserError
from sparse_lm.training.workdir import read_config

ROOT = pathlib.Path(__file__).parents[1]
KILL_AT = pathlib.Path(__file__).parent / "training" / "kill_at.py"
PROCESS = KILL_AT.with_name("process.py")
NUM_STEPS = 12  # of tests/tiny.py


# One device. Each process would compile every small program anew.
ENVIRONMENT = dict(os.environ, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")


@pytest.fixture(scope="session")
def call():
  """Runs a command to its end, as a user does."""

  def run(*arguments, stdin=""):
    command, *rest = map(str, arguments)
    prefix = ([command] if command.endswith(".py")
              else ["-m", f"sparse_lm.{command}"])
    return subprocess.run(
        [sys.executable, *prefix, *rest], env=ENVIRONMENT, cwd=ROOT,
        input=stdin, capture_output=True, text=True, timeout=300, check=False)

  return run


@pytest.fixture(scope="session")
def tiny_run(call, tiny_flags, tmp_path_factory):
  """A finished run's folder, and what `train` printed."""
  workdir = tmp_path_factory.mktemp("runs") / "tiny"
  result = call("train", *tiny_flags, f"--workdir={workdir}")
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


def lines_of(workdir, split):
  text = (workdir / "metrics.jsonl").read_text()
  return [line for line in map(json.loads, text.splitlines())
          if line["split"] == split]


def test_train_prints_progress_a_table_a_sample_and_its_files(tiny_run):
  workdir, out = tiny_run
  progress = next(l for l in out.splitlines() if l.startswith("step 10/12"))
  for part in ("loss ", "bits/byte", "tokens/s", "active neurons ",
               "keys attended ", "ETA 0m"):
    assert part in progress
  for part in ("validation loss", "perplexity", "bits per byte",
               "MFLOP per token", "a completion of 'the '"):
    assert part in out
  for name in ("metrics.jsonl", "config.json", "tokenizer.json", "checkpoints",
               "tensorboard", "learning_curve.png", "sparsity.png"):
    assert f"{workdir / name} " in out and (workdir / name).exists(), name
  for name in ("learning_curve.png", "sparsity.png"):
    assert (workdir / name).read_bytes().startswith(b"\x89PNG")
  assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_train_learns_and_stays_sparse(tiny_run):
  workdir, _ = tiny_run
  train = lines_of(workdir, "train")
  assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12]
  assert train[-1]["loss"] < train[0]["loss"] - 0.5
  assert 0.05 < train[-1]["active_fraction"] < 0.2
  assert len(train[-1]["active_fraction_N"]) == 2
  assert [line["step"] for line in lines_of(workdir, "eval")] == [6, 12]


def test_a_complete_run_says_so(call, tiny_flags, tiny_run):
  workdir, _ = tiny_run
  result = call("train", *tiny_flags, f"--workdir={workdir}")
  assert result.returncode == 0
  assert "this run is complete (12 steps)" in result.stdout
  assert "name another --workdir" in result.stdout


def test_evaluate_agrees_with_training(call, tiny_run, capsys):
  workdir, _ = tiny_run
  result = call("evaluate", f"--workdir={workdir}", "--batches=2", "--json")
  assert result.returncode == 0, result.stderr
  values, last = json.loads(result.stdout), lines_of(workdir, "eval")[-1]
  assert values["step"] == NUM_STEPS and values["split"] == "validation"
  for name in ("loss", "bits_per_byte", "active_fraction_N",
               "attended_keys_N"):
    np.testing.assert_allclose(values[name], last[name], rtol=1e-4)
  evaluate.main([f"--workdir={workdir}", "--split=test"])
  table = capsys.readouterr().out
  for part in ("split test", "test loss", "active neurons"):
    assert part in table


def test_generate(call, tiny_run, capsys):
  workdir, _ = tiny_run
  flags = [f"--workdir={workdir}", "--max_new_tokens=12", "--temperature=0"]
  streamed = call("generate", *flags, "--prompt=the ")
  assert streamed.returncode == 0, streamed.stderr
  assert streamed.stdout.startswith("the ") and not streamed.stderr
  whole = json.loads(
      call("generate", *flags, "--prompt=-", "--json", stdin="the ").stdout)
  assert "the " + whole["completion"] + "\n" == streamed.stdout
  assert 0.05 < whole["active_fraction"] < 0.2
  # Not computed whole and masked: inactive neurons are skipped in every layer.
  assert whole["ffn_implementations"] == ["xla", "xla"]
  # Too few keys for that.
  assert whole["attention_implementations"] == ["dense", "dense"]
  drawn = []
  for seed in (1, 1, 2):
    generate.main([*flags[:2], "--temperature=1", "--top_k=9",
                   f"--seed={seed}", "--prompt=the "])
    drawn.append(capsys.readouterr().out)
  assert drawn[0] == drawn[1] != drawn[2]
  assert all(len(text) > len("the ") for text in drawn)


def test_generate_refuses_what_it_cannot_do(tiny_run, capsys):
  flags = [f"--workdir={tiny_run[0]}", "--prompt=the "]
  for flag, part in [
      ("--ffn_implementation=pallas_gpu", "needs an NVIDIA Hopper GPU, not cpu"),
      ("--ffn_implementation=pallas_tpu", "needs a TPU, not cpu"),
      ("--ffn_implementation=cuda", "is not one of xla, "),
      ("--temperature=nan", "must be 0"), (f"--seed={2**63}", "is not in"),
      ("--max_new_tokens=0", "must be above 0")]:
    refused_here(generate.main, [*flags, flag], flag, part)
  generate.main([*flags, "--max_new_tokens=1", "--json"])
  told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
  assert told["completion"] and "active_fraction" not in told


def final_state(workdir):
  """Every array and every other byte that the last checkpoint decodes to."""
  import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top
  folder = workdir / "checkpoints" / str(NUM_STEPS)
  arrays = {name: ocp.StandardCheckpointer().restore(folder / name)
            for name in ("params", "rest")}
  position = {p.name: p.read_text()
              for p in (folder / "data").glob("process_*")}
  assert position
  return arrays, position


def assert_same_end(a, b, splits=("train", "eval")):
  import jax  # pylint: disable=g-import-not-at-top
  (arrays_a, data_a), (arrays_b, data_b) = final_state(a), final_state(b)
  jax.tree.map(np.testing.assert_array_equal, arrays_a, arrays_b)
  assert data_a == data_b
  for split in splits:
    ours, theirs = lines_of(a, split), lines_of(b, split)
    for line in (*ours, *theirs):
      line.pop("tokens_per_second", None)
    assert ours == theirs


def test_killed_again_and_again_is_as_uninterrupted(call, tiny_flags, tiny_run,
                                                    tmp_path):
  """Inside the first save, between saves, inside a later save; bit by bit."""
  workdir = tmp_path / "tiny"
  flags = [*tiny_flags, f"--workdir={workdir}"]
  # Saves are after steps 4, 8, 12. Evaluation places two batches at a time.
  for moment, number in (("save", 1), ("batch", 9), ("save", 1)):
    result = call(KILL_AT, moment, number, *flags)
    assert result.returncode == -signal.SIGKILL, result.stderr
  result = call("train", *flags)
  assert result.returncode == 0, result.stderr
  assert "resuming from step 4" in result.stdout
  assert_same_end(workdir, tiny_run[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(call, tiny_flags,
                                            tiny_run, tmp_path, number):
  workdir = tmp_path / "tiny"
  flags = [*tiny_flags, f"--workdir={workdir}"]
  process = subprocess.Popen(
      [sys.executable, "-u", "-m", "sparse_lm.train", *flags], cwd=ROOT,
      env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True)
  seen = []
  for line in process.stdout:
    seen.append(line)
    if line.startswith("step  2/12"):
      process.send_signal(number)
  assert process.wait() == 143, process.stderr.read()
  assert f"stopped by {number.name}: saved at step" in seen[-1]
  process.stdout.close()
  process.stderr.close()
  result = call("train", *flags)
  assert result.returncode == 0 and "resuming from step" in result.stdout
  # Stopping writes a train line of its own, and does not wait to evaluate.
  assert_same_end(workdir, tiny_run[0], splits=[])


def test_two_processes_train_one_model(tiny_flags, tmp_path, capsys):
  """Each with its share of the documents; one process evaluates the result.

  Held-out batches do not depend on the number of processes, so its loss must
  be the one that the two measured.
  """
  workdir = tmp_path / "two"
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  processes = [subprocess.Popen(
      [sys.executable, str(PROCESS), str(index), "2", str(port), *tiny_flags,
       f"--workdir={workdir}", "--config.training.num_steps=6",
       "--config.training.checkpoint_every=6"], cwd=ROOT, env=ENVIRONMENT,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for index in (0, 1)]
  results = [process.communicate(timeout=300) for process in processes]
  for process, (_, errors) in zip(processes, results):
    assert process.returncode == 0, errors
  assert "step 6/6" in results[0][0] and "step" not in results[1][0]
  assert [line["step"] for line in lines_of(workdir, "train")] == [2, 4, 6]
  evaluate.main([f"--workdir={workdir}", "--batches=2", "--json"])
  np.testing.assert_allclose(json.loads(capsys.readouterr().out)["loss"],
                             lines_of(workdir, "eval")[-1]["loss"], rtol=1e-4)


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_help(call, command):
  result = call(command, "--help")
  assert result.returncode == 0
  assert f"python -m sparse_lm.{command}" in result.stdout
  assert "--workdir FOLDER" in result.stdout


def refused(result, *parts):
  """One line of error with every part in it, the last, and status 2.

  Before it there may be notices of data that were prepared.
  """
  assert result.returncode == 2, result.stderr
  *notices, error = result.stderr.splitlines()
  assert error.startswith("error: ")
  assert all(line.startswith("text_folder: ") for line in notices), notices
  for part in parts:
    assert part in error


def refused_here(main, arguments, *parts):
  """In this process: of such an error `cli.run` makes what `refused` checks."""
  with pytest.raises(UserError) as error:
    main(list(map(str, arguments)))
  assert "\n" not in str(error.value)
  for part in parts:
    assert part in str(error.value)


@pytest.fixture
def train_main(monkeypatch):
  """`train.main` for this process, which is too old to join a cluster."""
  monkeypatch.setattr(train.mesh, "join_cluster", lambda config: None)
  return train.main


def test_train_refuses_bad_flags_before_it_starts(call, train_main, tiny_flags,
                                                  tmp_path):
  workdir = tmp_path / "run"
  at = f"--workdir={workdir}"
  refused(call("train", at), "--config")
  for flags, *parts in [
      (["--config=nowhere.py"], "--config=nowhere.py"),
      ([*tiny_flags, "--config.model.ffn.activ=relu"],
       "config.model.ffn.activ", "config.model.ffn.activation"),
      ([*tiny_flags, "--config.model.ffn.activation=swish"],
       "config.model.ffn.activation", "gelu_tanh"),
      ([*tiny_flags, "--config.training.mesh.data=3"],
       "config.training.mesh", "8 device")]:
    refused_here(train_main, [at, *flags], *parts)
  assert not (workdir / "config.json").exists()


def test_train_refuses_bad_folders(call, train_main, tiny_flags, tiny_run,
                                   tmp_path):
  a_file = tmp_path / "file"
  a_file.write_text("")
  refused_here(train_main, [*tiny_flags, f"--workdir={a_file}/run"],
               f"--workdir={a_file}/run", "cannot be written")
  before = sorted(tiny_run[0].rglob("*"))
  refused(call("train", *tiny_flags, f"--workdir={tiny_run[0]}",
               "--config.training.seed=7"), "another config",
          "config.training.seed")
  assert sorted(tiny_run[0].rglob("*")) == before


@pytest.mark.parametrize("key, value, parts", [
    ("data.path", "/nowhere/at/all", ["/nowhere/at/all"]),
    ("model.vocab_size", 100, ["100", "257"]),
    ("model.context_length", 1000000, [])])
def test_train_refuses_bad_data(train_main, tiny_flags, tmp_path, key, value,
                                parts):
  refused_here(train_main, [*tiny_flags, f"--workdir={tmp_path / 'run'}",
                            f"--config.{key}={value}"], f"config.{key}", *parts)


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    call, tiny_flags, tmp_path, capsys):
  workdir = tmp_path / "run"
  # The rate grows until something overflows, after the first checkpoint.
  result = call("train", *tiny_flags, f"--workdir={workdir}",
                "--config.training.optimizer.learning_rate=1e3",
                "--config.training.optimizer.warmup_steps=12",
                "--config.training.checkpoint_every=1",
                "--config.training.keep_checkpoints=3",
                "--config.training.eval_every=100")
  refused(result, "step ", "not finite numbers",
          "config.training.optimizer.learning_rate")
  step = int(result.stderr.split("error: step ")[1].split(":")[0])
  newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir()
               if p.name.isdigit())
  assert 0 < newest <= step - 1
  # What is left is good: its own loss is finite.
  evaluate.main([f"--workdir={workdir}", "--json"])
  assert np.isfinite(json.loads(capsys.readouterr().out)["loss"])


@pytest.fixture(scope="session")
def mini_suite(tmp_path_factory, tiny_flags):
  """A suite's file of two methods on the tiny experiment."""
  path = tmp_path_factory.mktemp("suite") / "mini.py"
  path.write_text(f'''
from sparse_lm import cli, config as config_lib
from sparse_lm.training.suite import Method, Suite


def get_suite(size):
  base = cli.load_config({tiny_flags[0].removeprefix("--config=")!r},
                         {tiny_flags[1:]!r})
  reglu = config_lib.replace(base, **{{
      "model.ffn.shape": "gated", "model.ffn.activation": "relu",
      "model.ffn.sparsifier": "none"}})
  return Suite(f"mini_{{size}}", (Method("spark", "Spark", base),
                                  Method("reglu", "ReGLU", reglu)))
''')
  return path


def test_compare_trains_what_is_missing_and_writes_the_results(
    call, mini_suite, tmp_path, capsys):
  flags = [f"--suite={mini_suite}", "--size=s",
           f"--workdir={tmp_path / 'runs'}",
           f"--results={tmp_path / 'results'}"]
  first = call("compare", *flags, "--only=spark",
               "--config.training.checkpoint_every=6")
  assert first.returncode == 0, first.stderr
  assert "[1/1] Spark, seed 0" in first.stdout
  assert "Not trained: ReGLU" in (tmp_path / "results/mini_s.md").read_text()
  compare.main(flags)
  both = capsys.readouterr().out
  assert "[2/2] ReGLU, seed 0" in both
  assert "[1/2]" not in both  # Spark was trained.
  results = json.loads((tmp_path / "results/mini_s.json").read_text())
  assert [list(m["runs"]) for m in results["methods"]] == [["0"], ["0"]]
  table = (tmp_path / "results/mini_s.md").read_text()
  assert "| ReGLU |" in table and f"{os.cpu_count()} CPU cores" in table
  assert (tmp_path / "results/mini_s.png").exists()
  # What was trained is evaluated and shifted like any run.
  shifted = tmp_path / "shifted"
  shift = call("shift_threshold", f"--workdir={tmp_path / 'runs/reglu-seed0'}",
               f"--output={shifted}", "--thresholds=0.01,1000", "--batches=1")
  assert shift.returncode == 0, shift.stderr
  assert "chosen: threshold " in shift.stdout
  capsys.readouterr()
  generate.main([f"--workdir={shifted}", "--prompt=the ", "--max_new_tokens=4",
                 "--json"])
  told = json.loads(capsys.readouterr().out)
  assert set(told["ffn_implementations"]) == {"xla"}
  assert 0 < told["active_fraction"] < 1


@pytest.mark.parametrize("flags, message", [
    (["--suite=nowhere.py"], "--suite=nowhere.py:tiny: no such file"),
    (["--only=sparkle"], "--only: 'sparkle' is not one of spark, reglu"),
    (["--seeds=0,0"], "--seeds=0,0: must be different"),
    (["--seeds=a"], "--seeds=a: is not a list"),
    (["--config.training.nun_steps=3"], "nearest: config.training.num_steps"),
    (["--suite=suites.ffn_methods", "--size=huge"], "'huge' is not one of tiny"),
])
def test_compare_refuses(mini_suite, tmp_path, flags, message):
  """In this process: `cli.run` makes such an error one line, see above."""
  with pytest.raises(UserError, match=message):
    compare.main([f"--suite={mini_suite}", f"--workdir={tmp_path / 'runs'}",
                  *flags])
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, message", [
    ([], "model.ffn.activation: only relu"),
    (["--thresholds=low"], "--thresholds=low: is not a list"),
    (["--thresholds=-1"], "--thresholds=-1: must not be negative"),
    (["--tolerance=-1"], "--tolerance=-1.0: must not be"),
    (["--batches=0"], "--batches=0: must be above 0"),
])
def test_shift_threshold_refuses(tiny_run, tmp_path, flags, message):
  with pytest.raises(UserError, match=message):
    shift_threshold.main([f"--workdir={tiny_run[0]}",
                          f"--output={tmp_path / 'out'}", *flags])
  assert not (tmp_path / "out").exists()


def test_evaluate_and_generate_refuse(call, tiny_run, tmp_path):
  at = f"--workdir={tiny_run[0]}"
  refused(call("evaluate", f"--workdir={tmp_path}"), str(tmp_path), "no run")
  refused(call("generate", at, "--temperature=hot"), "--temperature")
  for main, flag, *parts in [
      (evaluate.main, "--split=nowhere", "nowhere", "validation"),
      (evaluate.main, "--batches=0", "--batches=0"),
      (generate.main, f"--prompt={'a' * 40}", "--prompt",
       "41 tokens do not fit the model's context of 32"),
      (generate.main, "--top_p=2", "--top_p"),
      (generate.main, "--step=5", "no checkpoint 5")]:
    refused_here(main, [at, flag], *parts)


def test_benchmark_with_the_active_neurons_of_a_trained_model(
    tiny_run, tmp_path, capsys, monkeypatch):
  path, output = tmp_path / "scores.npy", tmp_path / "rows.json"
  evaluate.main([f"--workdir={tiny_run[0]}", "--batches=1",
                 f"--scores={path}"])
  model = read_config(tiny_run[0]).model
  scores_NxTxF = np.load(path)
  assert scores_NxTxF.shape == (model.num_layers, 32, model.ffn.num_neurons)
  # The rule's own words, for two tokens.
  wide = scores_NxTxF[:, :2].astype(np.float64)
  quantile = scipy.stats.norm.ppf(1 - 0.25)
  theta = wide.mean(-1) + quantile * wide.std(-1)
  active = wide > theta[..., None]
  # Each of the benchmark's neurons stands for one of the model's.
  neurons = 4 * model.ffn.num_neurons
  # More dims than tokens: the others must not matter.
  spark = FFNConfig(num_neurons=neurons, predictor_dim=48, active_fraction=0.25)
  dense = FFNConfig(shape="gated", num_neurons=64, sparsifier="none")
  monkeypatch.setattr(timing, "_pair", lambda suite: (spark, dense, 64))
  monkeypatch.setattr(timing, "read_bandwidth", lambda: 1e9)
  benchmark.main(["--suite=ffn", "--layers=4", "--tokens=1,2",
                  f"--scores={path}", f"--output={output}"])
  one, two = json.loads(output.read_text())["rows"]
  assert one["union_fraction"] == pytest.approx(active[:, :1].mean(), abs=0.02)
  assert one["active_fraction"] == pytest.approx(one["union_fraction"], abs=1e-6)
  assert two["union_fraction"] == pytest.approx(active.any(1).mean(), abs=0.02)
  # What was timed computes these, and not only their number.
  scores = timing._tiled(scores_NxTxF, neurons)
  _, one_pass, states, _ = timing._layers(spark, 64, 2, True, np.float32,
                                          scores)
  for i in range(2):
    x = timing._inputs(i + 1, 64, np.float32, scores)[i:]
    _, counts = one_pass(states, x)
    np.testing.assert_allclose(np.ravel(counts), 4 * active[:, i].sum(-1),
                               atol=4)
  assert "spark layer, 2 token(s), xla: " in capsys.readouterr().err
  empty = tmp_path / "empty.npy"
  empty.touch()
  for flags, *parts in [
      (["--suite=decode"], "--scores", "--suite=ffn"),
      (["--suite=ffn", "--tokens=64"], "--scores", "64 tokens"),
      (["--suite=ffn", "--tokens=1", f"--scores={empty}"], "empty.npy", "EOF"),
      (["--suite=ffn", "--tokens=1", f"--output={tmp_path}/none/rows.json"],
       "--output", "none is not a folder"),
      (["--suite=ffn", f"--scores={tmp_path / 'none.npy'}"], "none.npy")]:
    refused_here(benchmark.main, [f"--scores={path}", *flags], *parts)


def test_benchmark(call, tmp_path):
  output = tmp_path / "rows.json"
  result = call("benchmark", "--suite=topk_training", "--shape=8,16,64,4",
                f"--output={output}")
  assert result.returncode == 0, result.stderr
  title, heads, *lines = result.stdout.splitlines()
  assert title.startswith("topk_training on cpu, bfloat16, jax ")
  rows = json.loads(output.read_text())["rows"]
  assert [row["topk"] for row in rows] == [
      "none", "statistical", "top_k", "approx_max_k", "gated_xla"]
  assert rows[0]["ratio"] == 1 and all(row["ms"] > 0 for row in rows)
  refused_here(benchmark.main, ["--suite=topk_training", "--shape=8,16,64,16"],
               "--shape=8,16,64,16", "must be below the model dim 16")
  # Columns end where their heads do.
  assert heads.split() == list(rows[0])
  for line, row in zip(lines, rows, strict=True):
    assert len(line) == len(heads) and line.split() == [
        row["topk"], *(f"{row[name]:.3f}" for name in ("ms", "ratio", "MB"))]
