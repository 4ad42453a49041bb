"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

Three kernels. In the first each thread block takes a chunk of one key/value
head's keys, multiplies their first parts with the group's queries, and leaves
the scores and their statistics. In the second it adds all chunks' statistics
up to the threshold and asks for the second parts and values of its kept keys,
in copies that run by themselves; what it makes of them is a partial sum. The
third adds those up, in a fixed order: the same result every time.

`write_and_attend` takes queries, keys and values as a layer projects them: the
kernels turn them to their positions where they read them, and the first one
writes the newest key and value to the cache, in place. XLA needs three more
kernels for that, and each takes as long as one of these.

A chunk is four warps' keys. Statistics are each warp's own, so that no warp
waits for another to make them.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.sparse_attention.predictor import quantiles

# Keys of a chunk, of a warp, and that are copied together.
CHUNK, _OWN, _GROUP = 64, 16, 4
_WARPS = CHUNK // _OWN
# A copy's longest dimension.
_COLUMNS = 256
# Partial sums that are added up at a time.
_PARTS = 32
# A head's state of one token, three numbers of each warp's keys.
_MEAN, _SQUARE, _BEST = range(3)
_WEIGHT, _COUNT = range(2)

# Of (4, 16, columns): 4 keys a warp at a time, 8 lanes a key.
_KEYS = plgpu.Layout.TILED(
    plgpu.Tiling(((_WARPS, 4, 64), (8,))), warp_dims=(-4,),
    lane_dims=(-3, -2), vector_dim=-1)
# Of (4, rows, columns): a row a warp, 4 columns a thread.
_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((_WARPS, 1, 128), (4,))), warp_dims=(-4,), lane_dims=(-2,),
    vector_dim=-1)
# Of (parts, 4, columns): likewise.
_PARTIAL = plgpu.Layout.TILED(
    plgpu.Tiling(((1, _WARPS, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,),
    vector_dim=-1)
# Of a number for each warp's keys in the cache: each warp has all.
_STATE = plgpu.Layout.TILED(
    plgpu.Tiling(((32,), (1,))), warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,), vector_dim=-1)


def unsupported(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array
                ) -> str | None:
  """As `api.unsupported`."""
  for array in (query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE):
    if array.dtype != jnp.bfloat16:
      return f"needs bfloat16, not {array.dtype}"
  b, k, g, e = query_BxKxGxE.shape
  s, p = key1_BxKxSxP.shape[2:]
  if s % CHUNK:
    return f"{s} slots are not a multiple of {CHUNK}"
  for name, size in (("P", p), ("E - P", e - p), ("E", e)):
    if size % 128 or size > _COLUMNS:
      return f"{name} of {size} is not 128 or 256"
  if g > 8 or b > 64:
    return f"serves 8 queries a group and 64 rows, not {g} and {b}"
  return None


class _Queries:
  """Where the group's queries and the newest key and value are.

  Attributes:
    row: of the batch.
    head: of its key/value heads.
    group: query heads per key/value head.
  """

  def __init__(self, rows_gmem, rotary_gmem, heads: int, group: int):
    """Takes where they are.

    Args:
      rows_gmem: (B, rows, E): queries, then keys and values if there is
        `rotary_gmem`.
      rotary_gmem: (B, 2, E / 2), cosine and sine of each pair's angle, first
        part's and second's; None: what is there has been turned.
      heads: key/value heads.
      group: queries of each.
    """
    self.row = lax.axis_index("head") // heads
    self.head = lax.axis_index("head") % heads
    self.group = group
    self._rows, self._rotary, self._heads = rows_gmem, rotary_gmem, heads

  def _turned(self, row, first: int, width: int) -> list[jax.Array]:
    """Both halves of a part of a row, in float32."""
    half, layout = width // 2, _KEYS.reduce((0, 1))

    def get(ref, start):
      return mosaic_gpu.load(ref.at[pl.ds(start, half)], layout,
                             optimized=False).astype(jnp.float32)

    row = self._rows.at[self.row, row]
    a, b = get(row, first), get(row, first + half)
    if self._rotary is None:
      return [a, b]
    cos, sin = (get(self._rotary.at[self.row, i], first // 2) for i in (0, 1))
    # Rounded, as what the cache holds is.
    return [x.astype(jnp.bfloat16).astype(jnp.float32)
            for x in (a * cos - b * sin, b * cos + a * sin)]

  def query(self, i: int, first: int, width: int) -> list[jax.Array]:
    return self._turned(self.head * self.group + i, first, width)

  def new_key(self, first: int, width: int) -> list[jax.Array]:
    return self._turned(self._heads * self.group + self.head, first, width)

  def new_value(self, width: int) -> list[jax.Array]:
    row = self._heads * (self.group + 1) + self.head
    half, layout = width // 2, _KEYS.reduce((0, 1))
    return [mosaic_gpu.load(self._rows.at[self.row, row, pl.ds(i * half, half)],
                            layout, optimized=False) for i in range(2)]


def _store_halves(ref, halves) -> None:
  """Writes a row."""
  half = halves[0].shape[0]
  for i, x in enumerate(halves):
    mosaic_gpu.store(ref.at[pl.ds(i * half, half)], x.astype(jnp.bfloat16))


def _spread(x: jax.Array, shape, axes, layout) -> jax.Array:
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)


def _products(key_smem, halves) -> jax.Array:
  """Scaled products of a chunk's keys with a query, (4, 16) in float32."""
  half, total = halves[0].shape[0], None
  for i, x in enumerate(halves):
    key = mosaic_gpu.load(key_smem.at[:, :, pl.ds(i * half, half)], _KEYS)
    product = key.astype(jnp.float32) * _spread(x, key.shape, (2,), _KEYS)
    total = product if total is None else total + product
  return total.sum(2) * (2 * half) ** -0.5


def _seen(start, end) -> jax.Array:
  """Which of the chunk's keys are visible, (4, 16)."""
  layout = _KEYS.reduce(2)
  warp, own = (plgpu.broadcasted_iota(jnp.int32, (_WARPS, _OWN), i,
                                      layout=layout) for i in (0, 1))
  key = warp * _OWN + own + lax.axis_index("chunk") * CHUNK
  return (key >= start) & (key < end)


def _overlap(start, end, parts: jax.Array) -> jax.Array:
  """How many of each warp's keys are visible, by the warps' numbers."""
  below = jnp.minimum(parts * _OWN + _OWN, end)
  count = below - jnp.maximum(parts * _OWN, start)
  return jnp.maximum(count, 0).astype(jnp.float32)


def _in_sight(bounds_gmem, row, chunk):
  """The row's first visible slot, the one after the last, is one here?"""
  start, end = bounds_gmem[row, 0], bounds_gmem[row, 1]
  return start, end, (chunk * CHUNK < end) & ((chunk + 1) * CHUNK > start)


def _score_chunk(heads, group, bounds_gmem, rows_gmem, rotary_gmem, key1_gmem,
                 key2_gmem, value_gmem, score_gmem, state_gmem, *, key_smem,
                 barrier) -> None:
  """Scores of a chunk of keys, and their statistics.

  Args:
    heads: key/value heads.
    group: queries of each.
    bounds_gmem: as `_bounds` makes them.
    rows_gmem: as `_Queries` has it.
    rotary_gmem: likewise; if None, nothing is written to the cache.
    key1_gmem: (heads, S / 16, 16, P).
    key2_gmem: (heads, S / 16, 16, U).
    value_gmem: (heads, S / 16, 16, E).
    score_gmem: written, (heads, G, S / 16, 16).
    state_gmem: written, (heads, G, 3, S / 16).
    key_smem: first parts of the chunk.
    barrier: when they are there.
  """
  queries = _Queries(rows_gmem, rotary_gmem, heads, group)
  head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
  own, width = pl.ds(chunk * _WARPS, _WARPS), key1_gmem.shape[-1]
  start, end, visible = _in_sight(bounds_gmem, queries.row, chunk)

  newest = bounds_gmem[queries.row, 2]

  def write_newest():
    slot = (newest // _OWN, newest % _OWN)
    key1 = queries.new_key(0, width)
    _store_halves(key1_gmem.at[head, *slot], key1)
    _store_halves(key_smem.at[slot[0] % _WARPS, slot[1]], key1)
    _store_halves(key2_gmem.at[head, *slot],
                  queries.new_key(width, key2_gmem.shape[-1]))
    _store_halves(value_gmem.at[head, *slot],
                  queries.new_value(value_gmem.shape[-1]))
    plgpu.commit_smem()

  @pl.when(visible)
  def _():
    plgpu.copy_gmem_to_smem(key1_gmem.at[head, own], key_smem, barrier)
    query = [queries.query(g, 0, width) for g in range(group)]
    plgpu.barrier_wait(barrier)
    if rotary_gmem is not None:
      pl.when(newest // CHUNK == chunk)(write_newest)
    seen = _seen(start, end)
    layout = _KEYS.reduce((1, 2))
    warp = plgpu.broadcasted_iota(jnp.int32, (_WARPS,), 0, layout=layout)
    count = _overlap(start, end, warp + chunk * _WARPS)
    for g in range(group):
      score = _products(key_smem, query[g])
      mosaic_gpu.store(score_gmem.at[head, g, own], score)
      mean = jnp.where(seen, score, 0.0).sum(1) / jnp.maximum(count, 1.0)
      apart = score - _spread(mean, score.shape, (0,), _KEYS.reduce(2))
      square = jnp.where(seen, apart * apart, 0.0).sum(1)
      best = jnp.max(jnp.where(seen, score, -jnp.inf), axis=1)
      for i, x in ((_MEAN, mean), (_SQUARE, square), (_BEST, best)):
        mosaic_gpu.store(state_gmem.at[head, g, i, own], x)


def _capped(x, cap: float):
  return cap * jnp.tanh(x / cap) if cap else x


def _softplus(x: jax.Array) -> jax.Array:
  small = jnp.exp(-jnp.abs(x))
  # There is no log1p; its series where 1 + small is too coarse.
  series = small * (1.0 - small * (0.5 - small * (1 / 3)))
  return jnp.maximum(x, 0.0) + jnp.where(small < 0.01, series,
                                         jnp.log(1.0 + small))


def _threshold(state_gmem, quantile, start, end):
  """A query's least kept score and its best one, scalars."""
  mean, square, best = (
      mosaic_gpu.load(state_gmem.at[i], _STATE, optimized=False)
      for i in (_MEAN, _SQUARE, _BEST))
  part = plgpu.broadcasted_iota(jnp.int32, mean.shape, 0, layout=_STATE)
  count = _overlap(start, end, part)
  total = (end - start).astype(jnp.float32)
  # What stands where no key is visible was never written.
  there = count > 0.0
  mean_of_all = jnp.where(there, count * mean, 0.0).sum() / total
  # Chan et al., 1979: squared deviations of parts, put together.
  apart = mean - mean_of_all
  square = jnp.where(there, square + count * apart * apart, 0.0).sum()
  best = jnp.max(jnp.where(there, best, -jnp.inf))
  variance = square / total
  # sqrt(variance): there is rsqrt alone.
  std = variance * lax.rsqrt(jnp.maximum(variance, 1e-37))
  # Not of -inf: 0 * -inf is NaN.
  theta = mean_of_all + std * jnp.maximum(quantile, -1e30)
  theta = jnp.where(quantile > -jnp.inf, theta, -jnp.inf)
  return jnp.minimum(theta, best), best


def _mix_scratch(group: int, key2_gmem, value_gmem) -> dict:
  """Shared memory of `_mix_chunk`."""
  def rows(gmem):
    return plgpu.SMEM((_WARPS, _OWN, gmem.shape[-1]), jnp.bfloat16)

  groups = CHUNK // _GROUP
  return dict(
      kept_smem=plgpu.SMEM((_WARPS, _OWN), jnp.int32),
      weight_smem=plgpu.SMEM((group, _WARPS, _OWN), jnp.float32),
      key2_smem=rows(key2_gmem), value_smem=rows(value_gmem),
      key2_barrier=plgpu.Barrier(num_arrivals=groups),
      value_barrier=plgpu.Barrier(num_arrivals=groups))


def _mix_chunk(heads, group, softcap, bounds_gmem, quantile_gmem, rows_gmem,
               rotary_gmem, key2_gmem, value_gmem, score_gmem, state_gmem,
               part_gmem, sum_gmem, *, kept_smem, weight_smem, key2_smem,
               value_smem, key2_barrier, value_barrier) -> None:
  """The kept keys' part of the queries' results.

  Args: as `_score_chunk` has them, and
    softcap: of the logits.
    quantile_gmem: each row's, (B,).
    part_gmem: written, (heads, G, chunks / 4, 4, E) in float32: not divided.
    sum_gmem: written, (heads, G, 2, S / 16): the divisors, and counts.
    kept_smem: how many queries keep each key.
    weight_smem: their weights; below 0 where a key is not kept.
    key2_smem: second parts of the kept keys.
    value_smem: their values.
    key2_barrier: when those are there.
    value_barrier: when these are.
  """
  queries = _Queries(rows_gmem, rotary_gmem, heads, group)
  head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
  own = pl.ds(chunk * _WARPS, _WARPS)
  start, end, visible = _in_sight(bounds_gmem, queries.row, chunk)
  barriers = key2_barrier, value_barrier

  def weigh(g, seen):
    """A query's weights before the second parts, and 1 for its kept keys."""
    score = mosaic_gpu.load(score_gmem.at[head, g, own], _KEYS.reduce(2),
                            optimized=False)
    least, best = _threshold(state_gmem.at[head, g],
                             quantile_gmem[queries.row], start, end)
    weight = jnp.exp(_capped(score, softcap) - _capped(best, softcap))
    # A score that is NaN is kept, and so are all where `least` is.
    kept = jnp.where(seen, jnp.where(score < least, 0, 1), 0)
    divisor = jnp.where(kept > 0, weight, 0.0).sum(1)
    mosaic_gpu.store(sum_gmem.at[head, g, _WEIGHT, own], divisor)
    mosaic_gpu.store(sum_gmem.at[head, g, _COUNT, own],
                     kept.astype(jnp.float32).sum(1))
    return jnp.where(kept > 0, weight, -1.0), kept

  def ask(i):
    """Starts the copies of a group of keys if one is kept."""
    warp, first = i // (_OWN // _GROUP), i % (_OWN // _GROUP) * _GROUP
    kept = kept_smem[warp, first]
    for j in range(1, _GROUP):
      kept += kept_smem[warp, first + j]

    @pl.when(kept > 0)
    def _():
      rows = pl.ds(first, _GROUP)
      for gmem, smem, barrier in zip((key2_gmem, value_gmem),
                                     (key2_smem, value_smem), barriers):
        plgpu.copy_gmem_to_smem(gmem.at[head, chunk * _WARPS + warp, rows],
                                smem.at[warp, rows], barrier)

    @pl.when(kept == 0)
    def _():
      for barrier in barriers:
        plgpu.barrier_arrive(barrier)

  def mix(weights):
    first = rows_gmem.shape[-1] - key2_gmem.shape[-1]
    query = [queries.query(g, first, key2_gmem.shape[-1])
             for g in range(group)]
    plgpu.barrier_wait(key2_barrier)
    for g, weight in enumerate(weights):
      # What no copy has filled may hold anything: it is not selected.
      second = _softplus(_products(key2_smem, query[g]))
      weight_smem[g] = jnp.where(weight < 0.0, weight, weight * second)
    plgpu.commit_smem()
    plgpu.barrier_wait(value_barrier)
    totals = [None] * group
    for i in range(0, _OWN, _GROUP):
      rows = pl.ds(i, _GROUP)
      value = mosaic_gpu.load(value_smem.at[:, rows], _ROWS)
      value = value.astype(jnp.float32)
      for g in range(group):
        weight = mosaic_gpu.load(weight_smem.at[g, :, rows], _ROWS.reduce(2),
                                 optimized=False)
        weight = _spread(weight, value.shape, (0, 1), _ROWS)
        part = jnp.where(weight < 0.0, 0.0, weight * value).sum(1)
        totals[g] = part if totals[g] is None else totals[g] + part
    for g, total in enumerate(totals):
      mosaic_gpu.store(part_gmem.at[head, g, chunk // 4, chunk % 4],
                       total.sum(0))

  @pl.when(visible)
  def _():
    seen = _seen(start, end)
    weights, kept = zip(*(weigh(g, seen) for g in range(group)))
    kept_smem[...] = sum(kept[1:], kept[0])
    plgpu.commit_smem()
    pl.loop(0, CHUNK // _GROUP)(ask)
    mix(weights)


def _join_chunks(heads, bounds_gmem, part_gmem, sum_gmem, y_gmem, count_gmem
                 ) -> None:
  """A query's result, from all chunks in sight; how many keys it keeps.

  Args: as `_mix_chunk` has them, and
    y_gmem: written, (heads, G, E).
    count_gmem: written, (heads, G), int32.
  """
  head, g = lax.axis_index("head"), lax.axis_index("query")
  row = head // heads
  start, end, _ = _in_sight(bounds_gmem, row, 0)
  weight, count = (
      mosaic_gpu.load(sum_gmem.at[head, g, i], _STATE, optimized=False)
      for i in (_WEIGHT, _COUNT))
  part = plgpu.broadcasted_iota(jnp.int32, weight.shape, 0, layout=_STATE)
  there = _overlap(start, end, part) > 0.0
  divisor = jnp.where(there, weight, 0.0).sum()
  count_gmem[head, g] = jnp.where(there, count, 0.0).sum().astype(jnp.int32)
  chunks, width = part_gmem.shape[2], part_gmem.shape[-1]
  step = min(chunks, _PARTS // 4)
  shape = (step, 4, width)

  def add(i, total):
    parts = mosaic_gpu.load(part_gmem.at[head, g, pl.ds(i * step, step)],
                            _PARTIAL, optimized=False)
    chunk = (plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_PARTIAL)
             + i * step) * 4
    chunk += plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_PARTIAL)
    there = (chunk * CHUNK < end) & ((chunk + 1) * CHUNK > start)
    return total + jnp.where(there, parts, 0.0).sum(0)

  zero = plgpu.layout_cast(jnp.zeros(shape[1:], jnp.float32),
                           _PARTIAL.reduce(0))
  span = step * 4 * CHUNK
  total = lax.fori_loop(start // span, pl.cdiv(end, span), add, zero)
  mosaic_gpu.store(y_gmem.at[head, g],
                   (total.sum(0) / divisor).astype(y_gmem.dtype))


def _kernel(body: Callable, out_type, grid, **scratch):
  """A kernel of `grid`, by name of its axes.

  Not `plgpu.kernel`, which takes no array to write in place.
  """
  def scoped(*refs):
    pl.run_scoped(functools.partial(body, *refs), **scratch)

  scoped.__name__ = body.__name__
  return pl.kernel(
      scoped, out_type=out_type,
      mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid)),
      compiler_params=mosaic_gpu.PARAMS)


def _own_keys(x_BxKxSxE: jax.Array) -> jax.Array:
  """(heads, S / 16, 16, E)."""
  b, k, s, e = x_BxKxSxE.shape
  return x_BxKxSxE.reshape(b * k, s // _OWN, _OWN, e)


def _bounds(lengths_B: jax.Array, window: jax.Array | int, slots: int
            ) -> jax.Array:
  """Of each row the first visible slot, the one after the last, the newest."""
  ends = [jnp.maximum(lengths_B - window, 0), jnp.minimum(lengths_B, slots),
          lengths_B - 1]
  return jnp.stack(ends, -1).astype(jnp.int32)


def _attend(rows_BxRxE, rotary_Bx2xT, caches, bounds_Bx3, group, top_k,
            logit_softcap):
  """The kernels, one after the other.

  Args:
    rows_BxRxE: as `_Queries` has them.
    rotary_Bx2xT: likewise.
    caches: first parts, second parts and values, each (B, K, S, width).
    bounds_Bx3: as `_bounds` makes it.
    group: query heads per key/value head.
    top_k: as `api.sparse_attention` has it, like `logit_softcap`.
    logit_softcap: of the scores that the softmax sees.

  Returns:
    Results (B, K, G, E), counts (B, K, G), and the caches as they are then.
  """
  b, k, s, width = caches[2].shape
  heads, chunks = b * k, s // CHUNK
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  # Read whole, by warps: a multiple of their lanes.
  states = 32 * pl.cdiv(s // _OWN, 32)
  step = min(pl.cdiv(chunks, 4), _PARTS // 4)
  fours = step * pl.cdiv(chunks, 4 * step)
  grid = dict(head=heads, chunk=chunks)
  turned = () if rotary_Bx2xT is None else (rotary_Bx2xT,)
  keys = [_own_keys(x) for x in caches]
  if turned:
    keys = [jax.new_ref(x) for x in keys]

  def with_rotary(body, *constants):
    def call(*refs, before, **scratch):
      rotary = refs[before:before + len(turned)] or (None,)
      body(*constants, *refs[:before], *rotary, *refs[before + len(turned):],
           **scratch)
    return call

  score = functools.partial(with_rotary(_score_chunk, k, group), before=2)
  score.__name__ = "sparse_attention_scores"
  scores, states_of = _kernel(
      score, (f32((heads, group, s // _OWN, _OWN)),
              f32((heads, group, 3, states))), grid,
      key_smem=plgpu.SMEM((_WARPS, _OWN, keys[0].shape[-1]), jnp.bfloat16),
      barrier=plgpu.Barrier())(bounds_Bx3, rows_BxRxE, *turned, *keys)
  if turned:
    keys = [jax.freeze(x) for x in keys]
  quantile_B = quantiles(bounds_Bx3[:, 1] - bounds_Bx3[:, 0], s, top_k)
  mix = functools.partial(with_rotary(_mix_chunk, k, group, logit_softcap),
                          before=3)
  mix.__name__ = "sparse_attention_mix"
  parts, sums = _kernel(
      mix, (f32((heads, group, fours, 4, width)),
            f32((heads, group, 2, states))), grid,
      **_mix_scratch(group, *keys[1:]))(
          bounds_Bx3, quantile_B, rows_BxRxE, *turned, *keys[1:], scores,
          states_of)
  join = functools.partial(_join_chunks, k)
  join.__name__ = "sparse_attention_join"
  y, counts = _kernel(
      join, (jax.ShapeDtypeStruct((heads, group, width), rows_BxRxE.dtype),
             jax.ShapeDtypeStruct((heads, group), jnp.int32)),
      dict(head=heads, query=group))(bounds_Bx3, parts, sums)
  return (y.reshape(b, k, group, width), counts.reshape(b, k, group),
          [x.reshape(c.shape) for x, c in zip(keys, caches)])


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, window: jax.Array | int, top_k: int,
                     logit_softcap: float) -> tuple[jax.Array, jax.Array]:
  """As `api.sparse_attention`; what it serves, `unsupported` says."""
  b, k, g, e = query_BxKxGxE.shape
  bounds_Bx3 = _bounds(lengths_B, window, key1_BxKxSxP.shape[2])
  return _attend(query_BxKxGxE.reshape(b, k * g, e), None,
                 (key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE), bounds_Bx3, g,
                 top_k, logit_softcap)[:2]


def write_and_attend(rows_BxRxE: jax.Array, rotary_Bx2xT: jax.Array,
                     key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
                     value_BxKxSxE: jax.Array, lengths_B: jax.Array, *,
                     window: jax.Array | int, top_k: int, logit_softcap: float
                     ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """One token: its key and value are written, then its queries attend.

  Args:
    rows_BxRxE: what a layer projects its token to, R = K G + 2 K rows: queries,
      keys and values, none turned to its position.
    rotary_Bx2xT: cosine and sine of the angle of each pair of dims, T = E / 2:
      i of the first part and P / 2 + i, then those of the second part. The
      first part's pairs come first.
    key1_BxKxSxP: as `api.sparse_attention` has it, like what follows.
    key2_BxKxSxU: the second parts.
    value_BxKxSxE: the values.
    lengths_B: filled positions, the token's included: it is written to the
      last one, unless that is beyond the slots.
    window: how many tokens the query sees.
    top_k: about how many keys it keeps.
    logit_softcap: of the softmax.

  Returns:
    As `api.sparse_attention`, and the three arrays of the cache, written in
    place where they are not used again.
  """
  group = rows_BxRxE.shape[1] // value_BxKxSxE.shape[1] - 2
  bounds_Bx3 = _bounds(lengths_B, window, key1_BxKxSxP.shape[2])
  return _attend(rows_BxRxE, rotary_Bx2xT,
                 (key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE), bounds_Bx3,
                 group, top_k, logit_softcap)
