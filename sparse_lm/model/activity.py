"""What is measured of a feed-forward layer's activations, by name.

Each measure is a sum over the tokens that count, so that micro-batches and
devices add up exactly; divided by their number it is a mean. `N` layers of it
are what `Transformer.hidden` returns.

| name             | the sum over tokens of                                   |
|------------------|----------------------------------------------------------|
| active_neurons   | neurons whose activation is not 0                        |
| positive_gates   | neurons whose activation is above 0 (Spark's count)      |
| nonzero_hidden   | neurons whose intermediate output is not 0 (ProSparse's) |
| kept_gates       | neurons that the sparsifier lets through                 |
| fired            | 1 for each neuron that has a non-zero output (F,)        |
| l1               | the intermediate output's absolute values, all added     |
| union_<n>        | neurons that fire anywhere in a token's chunk of n       |
| adjacent         | BlockFFN's loss between a token and the one before it    |
| chunk_<n>        | BlockFFN's loss over a token's chunk of n                |
| scores           | no sum: what decides which neurons are active, (B, L, F) |

Chunks are of neighbours in a row of the batch, whatever their documents: as a
batch that is decoded together, or a draft that is verified, would be.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp

# Of every step: the loss of a decoder that skips what it can depends on them.
COUNTS = ("active_neurons", "nonzero_hidden")
# Of a decoding step.
DECODING = ("active_neurons",)
# Of an evaluation.
REPORT = (*COUNTS, "positive_gates", "kept_gates", "fired", "l1", "union_8",
          "union_32")
# How steep the sigmoid of BlockFFN's adjacent loss is, and what keeps its
# logarithm finite (arXiv 2507.08771, Section 3.3, and its code).
_STEEPNESS, _EPSILON = 100.0, 1e-5


@dataclasses.dataclass(frozen=True)
class Activity:
  """A feed-forward layer's activations, before they are summed up."""

  gate_BxLxF: jax.Array  # what the sparsifier lets through
  activation_BxLxF: jax.Array  # of the gate
  hidden_BxLxF: jax.Array  # the intermediate output, down's input
  # Above 0 where a neuron is active: the gate less the activation's threshold.
  margin_BxLxF: jax.Array
  # Of each token (B, L), by the measure's name: what was counted on the way,
  # and need not be counted by reading the activations again.
  counts: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  def measure(self, names: Sequence[str], counted_BxL: jax.Array,
              segments_BxL: jax.Array | None) -> dict[str, jax.Array]:
    """The named measures of the layer, float32.

    Args:
      names: as in the table above.
      counted_BxL: True for the tokens that count.
      segments_BxL: which document each token is of; None: one a row.
    """
    sums = {}
    for name in names:
      if name in self.counts:
        sums[name] = self.counts[name].sum(where=counted_BxL, dtype=jnp.float32)
      elif name in _MEASURES:
        sums[name] = _MEASURES[name](self, counted_BxL, segments_BxL)
      else:
        kind, length = name.rsplit("_", 1)
        sums[name] = _OF_CHUNKS[kind](self, counted_BxL, segments_BxL,
                                      length=int(length))
    return sums


@dataclasses.dataclass(frozen=True)
class ActiveCount:
  """What is known of a layer whose inactive neurons were never computed."""

  active_BxL: jax.Array  # how many of each token's activations are not 0

  def measure(self, names: Sequence[str], counted_BxL: jax.Array,
              segments_BxL: jax.Array | None) -> dict[str, jax.Array]:
    """As `Activity.measure`; of the measures `active_neurons` alone."""
    del segments_BxL
    assert tuple(names) == DECODING, names
    return {"active_neurons": self.active_BxL.sum(where=counted_BxL,
                                                  dtype=jnp.float32)}


def _count(active_BxLxF: jax.Array, counted_BxL: jax.Array) -> jax.Array:
  per_token = active_BxLxF.sum(-1, dtype=jnp.int32)
  return per_token.sum(where=counted_BxL, dtype=jnp.float32)


def active_neurons(activity, counted_BxL, segments_BxL):
  del segments_BxL
  return _count(activity.activation_BxLxF != 0, counted_BxL)


def positive_gates(activity, counted_BxL, segments_BxL):
  del segments_BxL
  return _count(activity.activation_BxLxF > 0, counted_BxL)


def nonzero_hidden(activity, counted_BxL, segments_BxL):
  del segments_BxL
  return _count(activity.hidden_BxLxF != 0, counted_BxL)


def kept_gates(activity, counted_BxL, segments_BxL):
  del segments_BxL
  return _count(activity.gate_BxLxF != 0, counted_BxL)


def fired(activity, counted_BxL, segments_BxL):
  del segments_BxL
  fires = (activity.hidden_BxLxF != 0) & counted_BxL[..., None]
  return fires.sum((0, 1), dtype=jnp.int32).astype(jnp.float32)


def l1(activity, counted_BxL, segments_BxL):
  del segments_BxL
  size = jnp.abs(activity.hidden_BxLxF).astype(jnp.float32).sum(-1)
  return size.sum(where=counted_BxL)


def scores(activity, counted_BxL, segments_BxL):
  """Of every token, to be looked at one by one."""
  del counted_BxL, segments_BxL
  return activity.margin_BxLxF.astype(jnp.float32)


def _chunks(x: jax.Array, length: int) -> jax.Array:
  """(B, L, ...) to (B, chunks, length, ...), the last one filled up with 0."""
  missing = -x.shape[1] % length
  x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, length, *x.shape[2:])


def union(activity, counted_BxL, segments_BxL, *, length: int):
  """Each chunk's union counts once for each of its tokens."""
  del segments_BxL
  fires = (activity.hidden_BxLxF != 0) & counted_BxL[..., None]
  size = _chunks(fires, length).any(2).sum(-1, dtype=jnp.int32)
  return (size * _chunks(counted_BxL, length).sum(2)).sum(dtype=jnp.float32)


def adjacent(activity, counted_BxL, segments_BxL):
  """Cross-entropy of a token's soft pattern given the token before it.

  arXiv 2507.08771, Eq. 4: BCE(sigmoid(a s_t), sigmoid(a s_t+1)), a = 100, mean
  over neurons, between tokens of one document. As in the authors' code s is
  what enters the ReLU, whose sign says whether a neuron is active, and both
  sides are differentiated.
  """
  logits = _STEEPNESS * activity.margin_BxLxF.astype(jnp.float32)
  before, after = logits[:, :-1], jax.nn.sigmoid(logits[:, 1:])
  loss_BxL = (jax.nn.softplus(before) - after * before).mean(-1)
  pairs = counted_BxL[:, 1:] & counted_BxL[:, :-1]
  if segments_BxL is not None:
    pairs &= segments_BxL[:, 1:] == segments_BxL[:, :-1]
  return loss_BxL.sum(where=pairs)


def chunk(activity, counted_BxL, segments_BxL, *, length: int):
  """The chance that a neuron is active somewhere in a chunk, mean over neurons.

  arXiv 2507.08771, Eq. 5: 1 - exp(sum over the chunk of ln(1 - p)), with p the
  token's activations divided by their sum.
  """
  del segments_BxL
  size = jnp.abs(activity.activation_BxLxF).astype(jnp.float32)
  p = size / (size.sum(-1, keepdims=True) + _EPSILON)
  p = _chunks(p * counted_BxL[..., None], length)
  chance = 1 - jnp.exp(jnp.log(1 - p + _EPSILON).sum(2)).mean(-1)
  return (chance * _chunks(counted_BxL, length).sum(2)).sum()


_MEASURES: dict[str, Callable] = {
    f.__name__: f for f in (active_neurons, positive_gates, nonzero_hidden,
                            kept_gates, fired, l1, adjacent, scores)}
_OF_CHUNKS: dict[str, Callable] = {"union": union, "chunk": chunk}

