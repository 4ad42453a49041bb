"""The dense layer in PyTorch, where it is installed, to compare with."""

import importlib.util
import statistics
import time


def dense_ffn_microseconds(model_dim: int, neurons: int, num_layers: int,
                           tokens: int) -> float | None:
  """A GeGLU layer, compiled, in bfloat16, replayed as a CUDA graph.

  Args:
    model_dim: D.
    neurons: F.
    num_layers: distinct ones, one after another.
    tokens: how many at a time.

  Returns:
    The median time of a layer; None without PyTorch or a GPU.
  """
  if not importlib.util.find_spec("torch"):
    return None
  import torch  # pylint: disable=g-import-not-at-top
  if not torch.cuda.is_available():
    return None

  def draw(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

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
