"""The decoder-only Transformer, in the manner of Gemma 2."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from sparse_lm.config import ModelConfig
from sparse_lm.model import activity
from sparse_lm.model.attention import Attention, layer_windows
from sparse_lm.model.cache import LayerCache
from sparse_lm.model.ffn import FFN
from sparse_lm.model.layers import RMSNorm, normal_param, project, softcap
from sparse_lm.model.sharding import LOGITS_AXES, LOOKUP_AXES, constrain


class Layer(NamedTuple):
  """What sets a layer apart, beside its parameters; arrays in a scan."""

  window: int | jax.Array  # tokens that a query sees, itself included
  sparse: bool | jax.Array  # whether the FFN's sparsifier is on


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """How sparse a forward pass was: sums over tokens, float32.

  Sums, not means, so that micro-batches and devices add up exactly. Padding
  tokens do not count.
  """

  tokens: jax.Array  # how many tokens the sums are over
  # Arrays (N,), or (N, F), by name: attended_keys (with weight, mean over
  # heads), visible_keys (that the mask allows), and those of activity.py.
  sums: dict[str, jax.Array]


def compute_dtype(config: ModelConfig) -> jnp.dtype:
  """The type of activations: `auto` is bfloat16 where the hardware has it.

  CPUs compute it more slowly than float32, NVIDIA GPUs before Ampere (compute
  capability 8) not at all.
  """
  if config.compute_dtype != "auto":
    return jnp.dtype(config.compute_dtype)
  device = jax.devices()[0]
  generation = str(getattr(device, "compute_capability", "")).split(".")[0]
  slow = device.platform == "cpu" or generation in ("5", "6", "7")
  return jnp.dtype("float32" if slow else "bfloat16")


def sum_up(positions_BxL: jax.Array, segments_BxL: jax.Array | None,
           attended_BxL: jax.Array, visible_BxL: jax.Array,
           neurons: activity.Activity | activity.ActiveCount,
           measures: Sequence[str]) -> dict[str, jax.Array]:
  """The sums of `Statistics` of a layer."""
  counted_BxL = (jnp.ones_like(positions_BxL, bool) if segments_BxL is None
                 else segments_BxL > 0)
  keys = dict(attended_keys=attended_BxL, visible_keys=visible_BxL)
  sums = {name: x.sum(where=counted_BxL, dtype=jnp.float32)
          for name, x in keys.items()}
  return sums | neurons.measure(measures, counted_BxL, segments_BxL)


class Block(nnx.Module):
  """Attention and feed-forward, each between two norms, each added on."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    def norm():
      return RMSNorm(config.model_dim, config.norm_epsilon)

    self.attention_norm, self.attention_out_norm = norm(), norm()
    self.ffn_norm, self.ffn_out_norm = norm(), norm()
    self.attention = Attention(config.attention, config.linear_inputs,
                               config.model_dim, rngs)
    self.ffn = FFN(config.ffn, config.linear_inputs, config.model_dim, rngs)

  def __call__(self, x_BxLxD: jax.Array, layer: Layer,
               positions_BxL: jax.Array, segments_BxL: jax.Array | None,
               cache: LayerCache | None, measures: Sequence[str]):
    """The block's output, the sums of `Statistics`, the cache."""
    y, attended_BxL, visible_BxL, cache = self.attention(
        self.attention_norm(x_BxLxD), positions_BxL, segments_BxL,
        layer.window, cache)
    x_BxLxD = constrain(x_BxLxD + self.attention_out_norm(y), "BxLxD")
    y, neurons = self.ffn(self.ffn_norm(x_BxLxD), layer.sparse)
    x_BxLxD = constrain(x_BxLxD + self.ffn_out_norm(y), "BxLxD")
    sums = sum_up(positions_BxL, segments_BxL, attended_BxL, visible_BxL,
                  neurons, measures)
    return x_BxLxD, sums, cache


class Transformer(nnx.Module):
  """Tokens in, logits and sparsity statistics out.

  The blocks' parameters are stored stacked, with a leading axis N, whether
  the layers run scanned or unrolled: one layout for checkpoints and sharding.
  `unstack` gives the layout for decoding, one block a layer.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.dtype = compute_dtype(config)
    self.embedding_VxD = normal_param(
        rngs, (config.vocab_size, config.model_dim), config.model_dim)
    keys = jax.random.split(rngs.params(), config.num_layers)
    self.blocks = nnx.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
    self.final_norm = RMSNorm(config.model_dim, config.norm_epsilon)

  def layers(self) -> Iterator[Block]:
    """The blocks one by one, in either layout."""
    if isinstance(self.blocks, nnx.List):
      yield from self.blocks
      return
    graph, stacked = nnx.split(self.blocks)
    for i in range(self.config.num_layers):
      yield nnx.merge(graph, jax.tree.map(lambda x: x[i], stacked))

  def hidden(self, tokens_BxL: jax.Array, positions_BxL: jax.Array,
             segments_BxL: jax.Array | None = None,
             cache: tuple[LayerCache, ...] | None = None,
             measures: Sequence[str] = activity.COUNTS):
    """Everything but the output logits.

    Args:
      tokens_BxL: token ids.
      positions_BxL: each token's position in its document.
      segments_BxL: which document of the row, 0 for padding; None: one
        document a row.
      cache: from `empty_cache`; the tokens are written to it.
      measures: what is measured of the neurons, see model/activity.py.

    Returns:
      The final hidden states (B, L, D), `Statistics`, and the new cache (None
      without one).
    """
    x_BxLxD = self._embed(tokens_BxL)

    def run(block, x, layer, layer_cache):
      return block(x, layer, positions_BxL, segments_BxL, layer_cache, measures)

    windows_N = layer_windows(self.config.attention, self.config.num_layers)
    layers = [Layer(*x) for x in zip(windows_N, self.config.sparse_layers)]
    if self.config.scan_layers and cache is None:
      x_BxLxD, sums = self._scan(run, x_BxLxD, layers)
    else:
      x_BxLxD, sums, cache = self._unroll(run, x_BxLxD, layers, cache)
    tokens = (jnp.asarray(tokens_BxL.size, jnp.float32) if segments_BxL is None
              else (segments_BxL > 0).sum(dtype=jnp.float32))
    return self.final_norm(x_BxLxD), Statistics(tokens, sums), cache

  def _scan(self, run, x_BxLxD, layers):
    graph, stacked = nnx.split(self.blocks)
    window_N, sparse_N = map(jnp.array, zip(*layers))
    # One that is the same in all layers need not be looked up in the scan.
    same = len(set(self.config.sparse_layers)) == 1

    def body(x, inputs):
      state, window, sparse = inputs
      layer = Layer(window, layers[0].sparse if same else sparse)
      x, sums, _ = run(nnx.merge(graph, state), x, layer, None)
      return x, sums

    return jax.lax.scan(self._remat(body), x_BxLxD,
                        (stacked, window_N, sparse_N))

  def _unroll(self, run, x_BxLxD, layers, cache):
    sums, caches = [], []
    for i, block in enumerate(self.layers()):
      graph, state = nnx.split(block)

      def body(x, state, layer_cache, graph=graph, layer=layers[i]):
        return run(nnx.merge(graph, state), x, layer, layer_cache)

      x_BxLxD, layer_sums, layer_cache = self._remat(body)(
          x_BxLxD, state, cache[i] if cache else None)
      sums.append(layer_sums)
      caches.append(layer_cache)
    sums = jax.tree.map(lambda *layer_sums: jnp.stack(layer_sums), *sums)
    return x_BxLxD, sums, tuple(caches) if cache else None

  def _remat(self, body):
    return jax.checkpoint(body) if self.config.remat == "block" else body

  def _embed(self, tokens_BxL: jax.Array) -> jax.Array:
    """Rows of the embedding, scaled. Each step's split is pinned: XLA, left to
    itself, copies the whole embedding to every device."""
    tokens_BxL = constrain(tokens_BxL, "BxL", LOOKUP_AXES)
    x_BxLxD = jnp.take(self._embedding(), tokens_BxL, axis=0)
    x_BxLxD = constrain(x_BxLxD.astype(self.dtype), "BxLxD", LOOKUP_AXES)
    return constrain(x_BxLxD * self.config.model_dim**0.5, "BxLxD")

  def _embedding(self) -> jax.Array:
    """The embedding (V, D), split as a lookup needs it."""
    return constrain(self.embedding_VxD[...], "VxD", LOOKUP_AXES)

  def output_embedding(self) -> jax.Array:
    """The embedding (V, D), split as `unembed` needs it."""
    return constrain(self._embedding(), "VxD", LOGITS_AXES)

  def unembed(self, x_BxLxD: jax.Array,
              embedding_VxD: jax.Array | None = None) -> jax.Array:
    """Float32 logits (B, L, V) of final hidden states.

    Args:
      x_BxLxD: the hidden states.
      embedding_VxD: `output_embedding()`, for a caller in a loop: what is made
        outside is made once.
    """
    if embedding_VxD is None:
      embedding_VxD = self.output_embedding()
    x_BxLxD = constrain(x_BxLxD, "BxLxD", LOGITS_AXES)
    logits_BxLxV = project(x_BxLxD, embedding_VxD.T,
                           preferred_element_type=jnp.float32)
    logits_BxLxV = constrain(logits_BxLxV, "BxLxV", LOGITS_AXES)
    return softcap(logits_BxLxV, self.config.final_logit_softcap)

  def __call__(self, tokens_BxL: jax.Array,
               positions_BxL: jax.Array | None = None,
               segments_BxL: jax.Array | None = None):
    """Logits (B, L, V) in float32 and `Statistics` of whole sequences."""
    if positions_BxL is None:
      positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]),
                                       tokens_BxL.shape)
    x_BxLxD, statistics, _ = self.hidden(tokens_BxL, positions_BxL,
                                         segments_BxL)
    return self.unembed(x_BxLxD), statistics


def model_graph(config: ModelConfig) -> nnx.GraphDef:
  """The model without its parameters: `nnx.merge(graph, params)` joins them."""
  return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def unstack(model: Transformer) -> Transformer:
  """The same model with one block a layer: the layout for decoding.

  A decode step then reads each layer's weights where they lie, with no slice
  to copy.
  """
  graph, state = nnx.split(model)
  unstacked = nnx.merge(graph, state)
  unstacked.blocks = nnx.List(model.layers())
  return unstacked
