"""What a warpgroup does with its keys in the kernel of `gpu`."""

import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.sparse_attention.statistics import (
    ROWS, by_query, lanes, seen_rows, send_statistics, threshold, total)
from sparse_lm.kernels.token_attention import (
    BY_KEY, BY_LANE, KEYS, OWN, WARPS, Place, add_values, all_fit, block_sync,
    capped, no_values, products, read_queries, start_copies, store_row)

# Width of both parts of a key, and of a value.
PART, WIDTH = 128, 256
_FIRST, _SECOND = pl.ds(0, PART), pl.ds(PART, PART)
# Listed keys are copied 16 at a time; so many such copies are on their way.
BATCHES = 2


@dataclasses.dataclass(frozen=True)
class Memory:
  """The kernel's arrays, in global and shared memory.

  Attributes:
    bounds_gmem: as `make_bounds` makes them.
    quantile_gmem: each row's, (B,).
    rows_gmem: as `fetch_rows` has it.
    rotary_gmem: likewise.
    key1_gmem: (heads, S / 16, 4, 4, P).
    key2_gmem: (heads, S / 16, 4, 4, U).
    value_gmem: (heads, S / 16, 4, 4, E).
    y_gmem: written, (heads, G, E).
    count_gmem: written, (heads, G), int32.
    query_smem: as `rows_memory` makes it.
    newest_smem: likewise.
    score_smem: as `send_statistics` has it.
    least_smem: of each query's kept scores.
    best_smem: of each query's, capped.
    weight_smem: weights of 16 keys of each warpgroup, of two rounds; below 0
      where a key is not kept.
    key1_smem: first parts, 16 of each warpgroup a stage. At last second parts
      of listed keys, where there is no other place for those.
    key2_smem: second parts, where all are copied.
    value_smem: values.
    key1_barrier: when first parts are there.
    rest_barrier: when second parts and values are, where all are copied.
    state_smem: as `state_memory` makes it.
    part_smem: as `join_memory` makes it, like all whose names are there.
    second_smem: what weights are multiplied with, where all are copied.
    list_smem: else the keys of each warpgroup that some query keeps.
    picked_smem: scores of 16 listed keys, twice.
  """

  bounds_gmem: jax.Array
  quantile_gmem: jax.Array
  rows_gmem: jax.Array
  rotary_gmem: jax.Array
  key1_gmem: jax.Array
  key2_gmem: jax.Array
  value_gmem: jax.Array
  y_gmem: jax.Array
  count_gmem: jax.Array
  query_smem: jax.Array
  newest_smem: jax.Array
  score_smem: jax.Array
  least_smem: jax.Array
  best_smem: jax.Array
  weight_smem: jax.Array
  key1_smem: jax.Array
  value_smem: jax.Array
  key1_barrier: jax.Array
  state_smem: jax.Array
  part_smem: jax.Array
  sum_smem: jax.Array
  all_part_smem: jax.Array
  all_sum_smem: jax.Array
  block_barrier: jax.Array
  key2_smem: jax.Array | None = None
  rest_barrier: jax.Array | None = None
  second_smem: jax.Array | None = None
  list_smem: jax.Array | None = None
  picked_smem: jax.Array | None = None


def _softplus(x: jax.Array) -> jax.Array:
  small = jnp.exp(-jnp.abs(x))
  # There is no log1p; its series where 1 + small is too coarse.
  series = small * (1.0 - small * (0.5 - small * (1 / 3)))
  return jnp.maximum(x, 0.0) + jnp.where(small < 0.01, series,
                                         jnp.log(1.0 + small))


class Warpgroup:
  """What a warpgroup does with its keys, round by round.

  Attributes:
    eager: whether all keys are copied at once.
    stages: how many rounds' first parts have a place.
    slots: of the cache.
    all_fit: whether all rounds have a place.
    first: of the rounds that are scored.
    last: the one after the last.
    start: the row's first visible slot.
    end: the one after the last.
    newest: the slot that is written.
    quantile: of the scores that are not kept.
    least: of each query's kept scores.
    best: of each query's, capped.
  """

  def __init__(self, at: Place, m: Memory, write: bool, softcap: float):
    self.at, self.m, self.write, self.softcap = at, m, write, softcap
    self.eager, self.stages = m.list_smem is None, m.key1_smem.shape[1]
    self.slots = m.key1_gmem.shape[1] * OWN
    self.all_fit = all_fit(at, self.slots, self.stages)
    self.queries = range(m.score_smem.shape[0])
    newest, value = m.newest_smem.at[0], m.newest_smem.at[1]
    key2_smem = m.key2_smem if self.eager else m.key1_smem
    # Where rows are, where they are copied to, and the newest.
    self.first_parts = m.key1_gmem, m.key1_smem, newest.at[_FIRST]
    self.rest = [(m.key2_gmem, key2_smem, newest.at[_SECOND]),
                 (m.value_gmem, m.value_smem, value)]

  def see(self) -> None:
    """Reads what is visible, and what is to be kept."""
    row, m = self.at.row, self.m
    self.start, self.end, self.newest = (m.bounds_gmem[row, i]
                                         for i in range(3))
    self.quantile = m.quantile_gmem[row]

  def start_copies(self) -> None:
    """Starts copies of as many rounds as have a place."""
    self.first, self.last = start_copies(
        self.at, self.slots, self.stages, self.start, self.end, self.copy)

  def copy(self, i) -> None:
    """Starts the copies of round `i`."""
    at, m, stage = self.at, self.m, i % self.stages
    own, barrier = at.sixteen(i), at.part * self.stages + stage
    plgpu.copy_gmem_to_smem(
        m.key1_gmem.at[at.head, own], m.key1_smem.at[at.part, stage],
        m.key1_barrier.at[barrier])
    if self.eager:
      for gmem, smem, _ in self.rest:
        plgpu.copy_gmem_to_smem(gmem.at[at.head, own], smem.at[at.part, stage],
                                m.rest_barrier.at[barrier])

  def score_all(self) -> None:
    """Leaves the scores of all rounds."""
    def read():
      return read_queries(self.m.query_smem.at[:, _FIRST])

    # Once, where they fit in registers.
    queries = read() if len(self.queries) <= 2 else None
    lax.fori_loop(self.first, self.last,
                  lambda i, _: self.score(i, queries or read()), None)

  def second_all(self) -> None:
    """Leaves what all rounds' weights are multiplied with."""
    if self.eager:
      lax.fori_loop(self.first, self.last, self.second, None)

  def write_newest(self, i, *rows) -> None:
    """Writes the newest of some rows, if it is in round `i`."""
    if not self.write:
      return
    at = self.at

    @pl.when(self.newest // OWN == at.sixteen(i))
    def _():
      slot = self.newest // KEYS % WARPS, self.newest % KEYS
      for gmem, smem, newest in rows:
        places = [gmem.at[at.head, self.newest // OWN, *slot]]
        if smem is not None:
          places.append(smem.at[at.part, i % self.stages, *slot])
        store_row(newest, *places)
      plgpu.commit_smem()

  def score(self, i, queries) -> None:
    """Leaves the scores of round `i`."""
    at, m, stage = self.at, self.m, i % self.stages
    plgpu.barrier_wait(m.key1_barrier.at[at.part * self.stages + stage])
    # Where all is copied, the rest may still be on its way.
    rest = [] if self.eager else [(x, None, y) for x, _, y in self.rest]
    self.write_newest(i, self.first_parts, *rest)
    for g, x in enumerate(products(m.key1_smem.at[at.part, stage], queries)):
      mosaic_gpu.store(m.score_smem.at[g, at.part, pl.ds(i * WARPS, WARPS)], x)
    if not self.all_fit:
      plgpu.commit_smem()
      pl.when(i + self.stages < self.last)(lambda: self.copy(i + self.stages))

  def second(self, i, _) -> None:
    """Leaves what weights of round `i` are multiplied with."""
    at, m = self.at, self.m
    plgpu.barrier_wait(m.rest_barrier.at[at.part * self.stages + i])
    self.write_newest(i, *self.rest)
    for g, x in enumerate(self.seconds(m.key2_smem.at[at.part, i])):
      mosaic_gpu.store(m.second_smem.at[g, at.part, pl.ds(i * WARPS, WARPS)], x)

  def seconds(self, key2_smem) -> list[jax.Array]:
    """What each query's weights are multiplied with."""
    queries = read_queries(self.m.query_smem.at[:, _SECOND])
    return [_softplus(x) for x in products(key2_smem, queries)]

  def find_thresholds(self) -> None:
    """Sends the cluster statistics, and reads what it has."""
    at, m = self.at, self.m
    first, last = at.rounds_of_block(self.start, self.end)
    send_statistics(at, m.score_smem, m.state_smem, first // 2,
                    (last + 1) // 2, self.start, self.end)
    mosaic_gpu.cluster_sync(self.second_all)

    def find(g):
      least, best = threshold(at, m.state_smem, g, self.quantile, self.start,
                              self.end)
      m.least_smem[g], m.best_smem[g] = least, capped(best, self.softcap)

    by_query(at, len(self.queries), find)
    block_sync(m.block_barrier)
    self.least, self.best = ([ref[g] for g in self.queries]
                             for ref in (m.least_smem, m.best_smem))

  def kept(self, score, seen, g: int) -> jax.Array:
    """1 for keys that a query keeps: those of NaN, and all where `least` is."""
    return jnp.where(seen, jnp.where(score < self.least[g], 0, 1), 0)

  def add(self, i, seen, score_smem, seconds, place: int, sums):
    """Adds up to 16 keys to the sums.

    Args:
      i: the round.
      seen: which of them there are, (4, 4).
      score_smem: their scores, a function of the query.
      seconds: of each query, what their weights are multiplied with.
      place: where their values lie.
      sums: divisors and counts of each key's thread, and totals.
    """
    at, m, (divisors, counts, totals) = self.at, self.m, sums
    divisors, counts = list(divisors), list(counts)
    for g in self.queries:
      score = mosaic_gpu.load(score_smem(g), BY_KEY.reduce(2), optimized=False)
      kept = self.kept(score, seen, g)
      weight = jnp.exp(capped(score, self.softcap) - self.best[g])
      mosaic_gpu.store(m.weight_smem.at[i % 2, at.part, g],
                       jnp.where(kept > 0, weight * seconds[g], -1.0))
      divisors[g] += jnp.where(kept > 0, weight, 0.0)
      counts[g] += kept.astype(jnp.float32)
    plgpu.commit_smem()
    totals = add_values(totals, m.weight_smem.at[i % 2, at.part],
                        m.value_smem.at[at.part, place])
    return divisors, counts, totals

  def add_round(self, i, sums):
    """Adds round `i`, of which all is there."""
    rows = self.at.part, pl.ds(i * WARPS, WARPS)
    return self.add(
        i, self.at.seen(i, self.start, self.end),
        lambda g: self.m.score_smem.at[g, *rows],
        [mosaic_gpu.load(self.m.second_smem.at[g, *rows], BY_KEY.reduce(2),
                         optimized=False) for g in self.queries], i, sums)

  def list_keys(self):
    """Lists the keys that some query keeps; returns how many."""
    at, m = self.at, self.m
    row, key = lanes((ROWS, KEYS))

    def add(i, count):
      seen = seen_rows(at, i, at.part, row, key, self.start, self.end)
      kept = [self.kept(mosaic_gpu.load(
          m.score_smem.at[g, at.part, pl.ds(i * ROWS, ROWS)], BY_LANE,
          optimized=False), seen, g) for g in self.queries]
      # A bit for each key, the same number in all threads.
      bits = total(functools.reduce(jnp.maximum, kept) << (row * KEYS + key))

      def put(state):
        bits, count = state
        m.list_smem[at.part, count] = (
            i * (ROWS * KEYS) + 31 - lax.clz(bits & -bits))
        return bits & (bits - 1), count + 1

      return lax.while_loop(lambda state: state[0] != 0, put, (bits, count))[1]

    first, last = at.rounds(self.start, self.end)
    return lax.fori_loop(first // 2, (last + 1) // 2, add, 0)

  def ask(self, batch, count) -> None:
    """Starts the copies of up to 16 listed keys, which the warps take in turn.
    """
    at, m, place = self.at, self.m, batch % BATCHES

    @plgpu.warp_map
    def _(warp):
      def copy(listed, to):
        key = m.list_smem[at.part, listed]
        # Not //, which jax 0.10 does not know here.
        row, column = lax.div(key, KEYS), lax.rem(key, KEYS)
        own = at.sixteen(lax.div(row, WARPS)), lax.rem(row, WARPS), column
        for gmem, smem, _ in self.rest:
          mosaic_gpu.start_row(gmem.at[at.head, *own],
                               smem.at[at.part, place, *to])
        for g in self.queries:
          m.picked_smem[place, at.part, g, *to] = m.score_smem[
              g, at.part, row, column]

      for i in range(KEYS):
        listed = batch * OWN + i * WARPS + warp
        pl.when(listed < count)(functools.partial(copy, listed, (warp, i)))

  def add_batch(self, batch, count, sums):
    """Adds 16 listed keys."""
    at, m, place = self.at, self.m, batch % BATCHES
    left = count - batch * OWN
    # The last batch's place and scores: read, or written.
    plgpu.commit_smem()
    mosaic_gpu.wait_for_rows(
        lambda: pl.when(left > OWN)(lambda: self.ask(batch + 1, count)))
    if self.write:
      # It is the last one; its copy may have been made before it was written.
      key = m.list_smem[at.part, count - 1]
      slot = at.sixteen(key // OWN) * OWN + key % OWN

      @pl.when((left <= OWN) & (slot == self.newest))
      def _():
        to = (left - 1) % WARPS, (left - 1) // WARPS
        for _, smem, newest in self.rest:
          store_row(newest, smem.at[at.part, place, *to])
        plgpu.commit_smem()

    warp, key = (
        plgpu.broadcasted_iota(jnp.int32, (WARPS, KEYS), axis,
                               layout=BY_KEY.reduce(2)) for axis in (0, 1))
    return self.add(
        batch, key * WARPS + warp < left,
        lambda g: m.picked_smem.at[place, at.part, g],
        self.seconds(m.key1_smem.at[at.part, place]), place, sums)

  def mix(self):
    """The totals of the warpgroup's keys, and their divisors and counts."""
    nothing = [plgpu.layout_cast(jnp.zeros((WARPS, KEYS), jnp.float32),
                                 BY_KEY.reduce(2))] * len(self.queries)
    sums = nothing, nothing, no_values(len(self.queries), WIDTH)
    if self.eager:
      sums = lax.fori_loop(self.first, self.last, self.add_round, sums)
    else:
      count = self.list_keys()
      plgpu.commit_smem()
      pl.when(count > 0)(lambda: self.ask(0, count))
      sums = lax.fori_loop(
          0, (count + OWN - 1) // OWN,
          lambda batch, sums: self.add_batch(batch, count, sums), sums)
    divisors, counts, totals = sums
    return totals, [(x.sum(1), y.sum(1)) for x, y in zip(divisors, counts)]
