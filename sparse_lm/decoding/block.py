"""A block laid out for decoding: sums and norms in one place each."""

from collections.abc import Sequence

from flax import nnx
import jax

from sparse_lm.decoding.layers import NeuronMajorFFN
from sparse_lm.kernels.add_norm import add_norm, add_norm_and_project
from sparse_lm.model.cache import LayerCache
from sparse_lm.model.layers import RMSNorm
from sparse_lm.model.transformer import Block, Layer, sum_up

# A residual stream, or one and what its next norm has yet to add to it.
Stream = jax.Array | tuple[jax.Array, jax.Array]


class AddNorm(nnx.Module):
  """Adds a layer's output to the residual stream, norms what the next reads.

  One kernel does both where there is one, so a block leaves its last output to
  be added by the next.
  """

  def __init__(self, out_norm: RMSNorm | None, norm: RMSNorm):
    """Takes over two norms: of what is added, if anything is, and the sum."""
    self.out_norm, self.norm = out_norm, norm

  def add(self, stream: Stream) -> tuple[jax.Array, jax.Array]:
    """The stream, all of it added, and its norm: both (B, L, D)."""
    if not isinstance(stream, tuple):
      return stream, self.norm(stream)
    x, norm = add_norm(*self._arrays(stream), epsilon=self.norm.epsilon)
    return tuple(a.reshape(stream[0].shape) for a in (x, norm))

  def add_and_project(self, stream: tuple[jax.Array, jax.Array],
                      rows_PxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of one token a row: the stream, and its norm's products (B, 1, P)."""
    x, product = add_norm_and_project(*self._arrays(stream), rows_PxD,
                                      epsilon=self.norm.epsilon)
    return x.reshape(stream[0].shape), product[:, None]

  def _arrays(self, stream) -> list[jax.Array]:
    """What the kernels take, tokens being rows."""
    return [*(a.reshape(-1, a.shape[-1]) for a in stream),
            self.out_norm.scale_D[...], self.norm.scale_D[...]]

  def __call__(self, stream: Stream) -> jax.Array:
    return self.add(stream)[1]


class DecodingBlock(nnx.Module):
  """As `Block`, but for where outputs are added."""

  def __init__(self, block: Block, before: RMSNorm | None):
    """Takes over the parts of `block`.

    Args:
      block: but for `ffn_out_norm`, which whatever follows applies.
      before: that of the block before, if there is one.
    """
    self.enter = AddNorm(before, block.attention_norm)
    self.between = AddNorm(block.attention_out_norm, block.ffn_norm)
    self.attention, self.ffn = block.attention, block.ffn

  def __call__(self, stream: Stream, layer: Layer, positions_BxL: jax.Array,
               segments_BxL: jax.Array | None, cache: LayerCache | None,
               measures: Sequence[str]):
    """As `Block`, of a stream whose last output is not yet added."""
    if isinstance(stream, tuple) and self.attention.takes_products(
        stream[0], cache):
      x_BxLxD, product_Bx1xP = self.enter.add_and_project(
          stream, self.attention.in_PxD[...])
      y_BxLxD, attended_BxL, visible_BxL, cache = self.attention.step(
          product_Bx1xP, positions_BxL, layer.window, cache)
    else:
      x_BxLxD, normed_BxLxD = self.enter.add(stream)
      y_BxLxD, attended_BxL, visible_BxL, cache = self.attention(
          normed_BxLxD, positions_BxL, segments_BxL, layer.window, cache)
    if isinstance(self.ffn, NeuronMajorFFN) and self.ffn.skips(x_BxLxD):
      x_BxLxD, y_BxLxD, neurons = self.ffn.add_norm_and_call(
          x_BxLxD, y_BxLxD, self.between.out_norm, self.between.norm)
    else:
      x_BxLxD, normed_BxLxD = self.between.add((x_BxLxD, y_BxLxD))
      y_BxLxD, neurons = self.ffn(normed_BxLxD, layer.sparse)
    sums = sum_up(positions_BxL, segments_BxL, attended_BxL, visible_BxL,
                  neurons, measures)
    return (x_BxLxD, y_BxLxD), sums, cache
