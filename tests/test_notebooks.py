"""The notebooks run from the first cell to the last."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(
    (pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


# What a reader waits a minute for.
FEWER = {'"training.num_steps": 120': '"training.num_steps": 24',
         '"training.eval_every": 60': '"training.eval_every": 24'}


def shorten(notebook):
  """Trains for fewer steps; every cell runs."""
  for long, short in FEWER.items():
    cell, = (cell for cell in notebook.cells if long in cell.source)
    cell.source = cell.source.replace(long, short)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)
  shorten(notebook)
  nbclient.NotebookClient(
      notebook, timeout=400, kernel_name="python3",
      resources={"metadata": {"path": str(tmp_path)}}).execute()
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  text = "".join(o.get("text", "") for o in outputs)
  assert "keys attended" in text and "a completion of 'def '" in text
  pictures = [o for o in outputs if "image/png" in o.get("data", {})]
  assert len(pictures) == 2
