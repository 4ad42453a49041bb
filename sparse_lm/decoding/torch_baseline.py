"""The dense layer in PyTorch, where it is installed, to compare with."""

from collections.abc import Callable
import importlib.util
import statistics
import time

import jax


def dense_ffn_microseconds(model_dim: int, neurons: int, num_layers: int,
                           tokens: int, dtype: str,
                           log: Callable[[str], None]) -> float | None:
  """A GeGLU layer, compiled, replayed as a CUDA graph.

  Args:
    model_dim: D.
    neurons: F.
    num_layers: distinct ones, one after another.
    tokens: how many at a time.
    dtype: of everything, by name.
    log: is told why PyTorch failed, where it did.

  Returns:
    The median time of a layer; None where JAX does not run on a GPU, and
    without a PyTorch that does.
  """
  if jax.default_backend() != "gpu" or not importlib.util.find_spec("torch"):
    return None
  import torch  # pylint: disable=g-import-not-at-top
  if not torch.cuda.is_available():
    return None
  try:
    return _time(torch, model_dim, neurons, num_layers, tokens, dtype)
  except RuntimeError as e:  # Its compiler's errors are such, too.
    log(f"PyTorch failed: {str(e).splitlines()[0]}")
    return None


def _time(torch, model_dim, neurons, num_layers, tokens, dtype) -> float:
  def draw(*shape):
    return torch.randn(*shape, device="cuda", dtype=getattr(torch, dtype))

  layers = [[draw(*shape) * shape[0]**-0.5 for shape in (
      (model_dim, neurons), (model_dim, neurons), (neurons, model_dim))]
            for _ in range(num_layers)]

  @torch.compile
  def run(x):
    for gate, up, down in layers:
      hidden = torch.nn.functional.gelu(x @ gate, approximate="tanh")
      x = x + 1e-3 * ((hidden * (x @ up)) @ down)
    return x

  x = draw(tokens, model_dim)
  stream = torch.cuda.Stream()
  with torch.cuda.stream(stream):
    for _ in range(3):
      run(x)
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    run(x)
  laps = []
  for _ in range(8):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(30):
      graph.replay()
    torch.cuda.synchronize()
    laps.append((time.perf_counter() - start) / 30)
  return 1e6 * statistics.median(laps[1:]) / num_layers
