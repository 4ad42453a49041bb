"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

A thread block a token holds the token in registers between the two norms. For
one token XLA starts four kernels, each of which takes as long. Where the norm
is projected, `gpu_project` has one kernel for all.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.add_norm.gpu_project import (
    add_norm_and_project as add_norm_and_project)
from sparse_lm.kernels.add_norm.gpu_project import (
    takes_in_rows as takes_in_rows)
from sparse_lm.kernels.add_norm.gpu_token import add_and_norm, load_token

_MAX_COLUMNS = 8192
_MAX_TOKENS = 64


def unsupported(x_NxD: jax.Array) -> str | None:
  """As `api.unsupported`."""
  tokens, columns = x_NxD.shape
  if x_NxD.dtype != jnp.bfloat16:
    return f"needs bfloat16, not {x_NxD.dtype}"
  if columns % 256 or columns > _MAX_COLUMNS:
    return (f"needs D to be a multiple of 256 up to {_MAX_COLUMNS}, not "
            f"{columns}")
  if tokens > _MAX_TOKENS:
    return f"serves {_MAX_TOKENS} tokens, not {tokens}"
  return None


def _token(epsilon, x_gmem, y_gmem, y_scale_gmem, scale_gmem, sum_gmem,
           norm_gmem) -> None:
  """One token: see `api.add_norm` for what the arrays are."""
  token = lax.axis_index("token")
  total, norm = add_and_norm(
      *load_token((x_gmem.at[token], y_gmem.at[token], y_scale_gmem,
                   scale_gmem)), epsilon)
  mosaic_gpu.store(sum_gmem.at[token], total)
  mosaic_gpu.store(norm_gmem.at[token], norm)


@functools.partial(jax.jit, static_argnums=4)
def add_norm(x_NxD: jax.Array, y_NxD: jax.Array, y_scale_D: jax.Array,
             scale_D: jax.Array, epsilon: float
             ) -> tuple[jax.Array, jax.Array]:
  """As `api.add_norm`."""
  like_x = jax.ShapeDtypeStruct(x_NxD.shape, x_NxD.dtype)
  body = functools.partial(_token, epsilon)
  body.__name__ = "add_norm"
  return tuple(pl.kernel(
      body, out_type=(like_x, like_x),
      mesh=plgpu.Mesh(grid=(x_NxD.shape[0],), grid_names=("token",)),
      compiler_params=mosaic_gpu.PARAMS)(x_NxD, y_NxD, y_scale_D, scale_D))
