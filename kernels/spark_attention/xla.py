"""The operation in XLA, block by block: no array is L x L.

With s1, s2 the scores of a query and the keys s it keeps, v the values:

    p = softmax(cap(s1))   g = softplus(s2)   out = sum_s p_s g_s v_s

First a pass over the blocks for each query's statistics, which the threshold
and the softmax's maximum come from; with both known, one pass for `out` and
the softmax's sum, which needs no rescaling on the way. The backward pass
computes the scores again. With o the gradient of `out`, and a_s = o . v_s:

    dv_s  = sum over queries of p_s g_s o
    ds1_s = p_s (g_s a_s - o . out) cap'(s1_s)
    ds2_s = p_s a_s sigmoid(s2_s)

Blocks that lie wholly after their queries, or before a window that is known
when compiling, are left out of a list made beforehand: a loop of known length
needs no decision on the device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.kernels.gaussian import quantile
from sparse_lm.kernels.spark_attention.reference import cap_scores, seen

# The position of keys that fill the last block: after every query.
_NOWHERE = 2**30


@dataclasses.dataclass(frozen=True)
class _Spec:
  """What is known when compiling."""

  predictor_dim: int
  top_k: int
  softcap: float
  block_q: int
  block_k: int
  window: int | None  # None: known on the device alone

  def blocks(self, queries: int, keys: int) -> np.ndarray:
    """First query and key (N, 2) of each block in which something is seen."""
    pairs = []
    for q in range(0, queries, self.block_q):
      for k in range(0, min(keys, q + self.block_q), self.block_k):
        nearest = q - (k + self.block_k - 1)
        if self.window is None or nearest < self.window:
          pairs.append((q, k))
    return np.array(pairs, np.uint32)  # Of signed ones jax asks whether < 0.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Places:
  """Where queries and keys are, which says who sees whom."""

  query_BxL: jax.Array
  key_BxS: jax.Array
  query_segment_BxL: jax.Array | None
  key_segment_BxS: jax.Array | None
  window: jax.Array

  def seen(self, q, k, spec: _Spec) -> jax.Array:
    """Of the block at (q, k): (B, 1, 1, block_q, block_k)."""
    at_q = functools.partial(_take, start=q, size=spec.block_q, axis=1)
    at_k = functools.partial(_take, start=k, size=spec.block_k, axis=1)
    if self.query_segment_BxL is None:
      segments = None, None
    else:
      segments = at_q(self.query_segment_BxL), at_k(self.key_segment_BxS)
    return seen(at_q(self.query_BxL), at_k(self.key_BxS), *segments,
                self.window)[:, None, None]


def _take(x, start, size, axis):
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x, block, start, axis):
  return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis)


def _add(x, block, start, axis):
  return _put(x, _take(x, start, block.shape[axis], axis) + block, start, axis)


def _wide(dtype):
  return jnp.promote_types(dtype, jnp.float32)


def _dot(equation, x, y):
  """A product in the inputs' type, summed in float32."""
  return jnp.einsum(equation, x, y, preferred_element_type=_wide(x.dtype))


def _rows(x_BxKxGxLxE):
  """A group's queries as rows of one matrix: (B, K, G L, E)."""
  b, k, g, l, e = x_BxKxGxLxE.shape
  return x_BxKxGxLxE.reshape(b, k, g * l, e)


def _scores(query_BxKxGxLxE, key_BxKxSxE):
  """Scaled dot products (B, K, G, L, S) of a block."""
  b, k, g, l, e = query_BxKxGxLxE.shape
  scores = _dot("bkqe,bkse->bkqs", _rows(query_BxKxGxLxE), key_BxKxSxE)
  return e**-0.5 * scores.reshape(b, k, g, l, -1)


def _over_blocks(step, carry, places, spec):
  """carry = step(carry, q, k) over the blocks in which something is seen."""
  starts = spec.blocks(places.query_BxL.shape[1], places.key_BxS.shape[1])
  return jax.lax.scan(lambda carry, qk: (step(carry, *qk), None), carry,
                      starts)[0]


def threshold(center, total, squares, visible_BxL, top_k: int,
              keys: int) -> jax.Array:
  """Of each query (B, K, G, L), -inf where all keys are kept.

  Args:
    center: some number near its scores.
    total: its scores less that, added up.
    squares: their squares, added up.
    visible_BxL: how many keys it sees, of `keys`.
    top_k: about how many it keeps.
    keys: the most that a query can see.
  """
  table = jnp.asarray(quantile(top_k, np.arange(keys + 1)), total.dtype)
  at, count = (x[:, None, None] for x in (table[visible_BxL], visible_BxL))
  mean = total / count
  std = jnp.sqrt(jnp.maximum(squares / count - jnp.square(mean), 0))
  return jnp.where(at > -jnp.inf, center + mean + std * at, -jnp.inf)


def _statistics(query, key, places, spec):
  """What a query's scores must reach, their largest, how many keys it sees.

  Args:
    query: (B, K, G, L, P), the part that predicts.
    key: (B, K, S, P).
    places: of both.
    spec: k and the blocks.

  Returns:
    floor and best (B, K, G, L) in float32; visible (B, L).
  """
  wide, p = _wide(query.dtype), query.shape[-1]
  # Squares are summed about the mean key's score, since a mean far from 0
  # would leave float32 few digits of the variance.
  wide_key = key.astype(wide)
  shown = (places.key_BxS < _NOWHERE)[:, None, :, None]
  center_key = wide_key.mean(2, where=shown)
  center = p**-0.5 * jnp.einsum("bkgle,bke->bkgl", query.astype(wide),
                                center_key)

  def step(carry, q, k):
    total, squares, best, visible = carry
    mask = places.seen(q, k, spec)
    scores = _scores(_take(query, q, spec.block_q, 3),
                     _take(key, k, spec.block_k, 2))
    off = jnp.where(
        mask, scores - _take(center, q, spec.block_q, 3)[..., None], 0)
    top = scores.max(-1, where=mask, initial=-jnp.inf)
    best = _put(best, jnp.maximum(_take(best, q, spec.block_q, 3), top), q, 3)
    return (_add(total, off.sum(-1), q, 3),
            _add(squares, jnp.square(off).sum(-1), q, 3), best,
            _add(visible, mask[:, 0, 0].sum(-1), q, 1))

  zero = jnp.zeros_like(center)
  total, squares, best, visible = _over_blocks(
      step, (zero, zero, zero - jnp.inf, jnp.zeros_like(places.query_BxL)),
      places, spec)
  # The best key is kept whatever the threshold. Its score is computed again,
  # and may then be rounded otherwise: by so much it may fall short.
  key_length = jnp.linalg.norm(wide_key, axis=-1, keepdims=True).mean(
      2, where=shown)[..., None]
  slack = 8 * jnp.finfo(wide).eps * p**-0.5 * key_length * jnp.linalg.norm(
      query.astype(wide), axis=-1)
  theta = threshold(center, total, squares, visible, spec.top_k, key.shape[2])
  return jnp.minimum(theta, best - slack), best, visible


def _split(x, spec):
  """The part that predicts, and the other."""
  return jnp.split(x, [spec.predictor_dim], axis=-1)


def _softplus(x):
  """softplus(x) and its slope, from one exponential."""
  e = jnp.exp(-jnp.abs(x))
  return jnp.maximum(x, 0) + jnp.log1p(e), jnp.where(x >= 0, 1, e) / (1 + e)


def _forward(query, key, value, places, spec):
  """`_attend`'s results, and the statistics that the backward pass needs."""
  (query_1, query_2), (key_1, key_2) = _split(query, spec), _split(key, spec)
  floor, best, visible = _statistics(query_1, key_1, places, spec)
  top = cap_scores(best, spec.softcap)

  def step(carry, q, k):
    mixed, normalizer, attended = carry
    at_q = functools.partial(_take, start=q, size=spec.block_q, axis=3)
    at_k = functools.partial(_take, start=k, size=spec.block_k, axis=2)
    scores = _scores(at_q(query_1), at_k(key_1))
    kept = places.seen(q, k, spec) & (scores >= at_q(floor)[..., None])
    p = jnp.where(kept, jnp.exp(cap_scores(scores, spec.softcap)
                                - at_q(top)[..., None]), 0)
    gate, _ = _softplus(_scores(at_q(query_2), at_k(key_2)))
    block = _dot("bkqs,bkse->bkqe", _rows((p * gate).astype(value.dtype)),
                 at_k(value))
    return (_add(mixed, block.reshape(*p.shape[:4], -1), q, 3),
            _add(normalizer, p.sum(-1), q, 3),
            _add(attended, kept.sum(-1, dtype=p.dtype), q, 3))

  zero = jnp.zeros_like(floor)
  mixed = jnp.zeros((*floor.shape, value.shape[-1]), floor.dtype)
  mixed, normalizer, attended = _over_blocks(
      step, (mixed, zero, zero), places, spec)
  mixed = (mixed / normalizer[..., None]).astype(value.dtype)
  log_sum = top + jnp.log(normalizer)
  return (mixed, attended.mean((1, 2)), visible), (floor, log_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, places, spec):
  """Mixed values, keys kept, keys seen; lengths are whole blocks."""
  return _forward(query, key, value, places, spec)[0]


def _attend_fwd(query, key, value, places, spec):
  out, statistics = _forward(query, key, value, places, spec)
  return out, (query, key, value, places, out[0], *statistics)


def _attend_bwd(spec, residuals, gradients):
  query, key, value, places, out, floor, log_sum = residuals
  queries, keys = _split(query, spec), _split(key, spec)
  d_out, cap = gradients[0], spec.softcap
  inner = (d_out.astype(floor.dtype) * out.astype(floor.dtype)).sum(-1)

  def step(carry, q, k):
    d_query, d_key, d_value = carry
    at_q = functools.partial(_take, start=q, size=spec.block_q, axis=3)
    at_k = functools.partial(_take, start=k, size=spec.block_k, axis=2)
    parts = [(at_q(query), at_k(key)) for query, key in zip(queries, keys)]
    scores_1, scores_2 = (_scores(*part) for part in parts)
    capped = cap_scores(scores_1, cap)
    kept = places.seen(q, k, spec) & (scores_1 >= at_q(floor)[..., None])
    p = jnp.where(kept, jnp.exp(capped - at_q(log_sum)[..., None]), 0)
    gate, slope = _softplus(scores_2)
    d_rows = _rows(at_q(d_out))
    d_weights = _dot("bkqe,bkse->bkqs", d_rows, at_k(value)).reshape(p.shape)
    d_1 = p * (gate * d_weights - at_q(inner)[..., None])
    if cap:
      d_1 *= 1 - jnp.square(capped / cap)
    to_query, to_key = [], []
    for part, d_scores in zip(parts, (d_1, p * d_weights * slope)):
      width = part[0].shape[-1]
      d_scores = _rows((width**-0.5 * d_scores).astype(query.dtype))
      to_query.append(_dot("bkqs,bkse->bkqe", d_scores, part[1]))
      to_key.append(_dot("bkqs,bkqe->bkse", d_scores, _rows(part[0])))
    to_query = jnp.concatenate(to_query, -1).reshape(*p.shape[:4], -1)
    to_value = _dot("bkqs,bkqe->bkse",
                    _rows((p * gate).astype(d_out.dtype)), d_rows)
    return (_add(d_query, to_query, q, 3),
            _add(d_key, jnp.concatenate(to_key, -1), k, 2),
            _add(d_value, to_value, k, 2))

  arrays = query, key, value
  sums = _over_blocks(
      step, tuple(jnp.zeros_like(x, floor.dtype) for x in arrays), places, spec)
  return *(d.astype(x.dtype) for d, x in zip(sums, arrays)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def spark_attention(query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, positions_BxL,
                    segments_BxL, window, predictor_dim, top_k, softcap,
                    block_q, block_k):
  """As `api.spark_attention`."""
  length = positions_BxL.shape[1]
  spec = _Spec(predictor_dim, top_k, softcap, block_q=min(block_q, length),
               block_k=min(block_k, length),
               window=window if isinstance(window, int) else None)

  def fill(x, axis, block, **options):
    """To a multiple of the block."""
    if x is None or length % block == 0:
      return x
    pad = [(0, -length % block if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad, **options)

  # A query beyond the last is where that one is, so that it sees some key.
  last = functools.partial(fill, axis=1, block=spec.block_q, mode="edge")
  places = _Places(
      last(positions_BxL),
      fill(positions_BxL, 1, spec.block_k, constant_values=_NOWHERE),
      last(segments_BxL), fill(segments_BxL, 1, spec.block_k),
      jnp.asarray(window, jnp.int32))
  mixed, *counts = _attend(fill(query_BxKxGxLxE, 3, spec.block_q),
                           fill(key_BxKxLxE, 2, spec.block_k),
                           fill(value_BxKxLxE, 2, spec.block_k), places, spec)
  return mixed[..., :length, :], *(x[:, :length] for x in counts)
