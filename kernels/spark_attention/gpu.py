"""The operation in Pallas Mosaic GPU, for NVIDIA Hopper.

The formulas are `xla.py`'s, and so is the order: each query's statistics, the
values mixed, and backward the scores once more. Five kernels, of the form that
`gpu_form.py` has. In three keys pass by queries: statistics, mixed values, the
queries' gradient. In two queries pass by keys: the values' and the keys'
gradients. Of those one kernel could make both, but 64 rows of 2 x 256 sums do
not fit in registers.

Exponentials and logarithms have base 2 here, as the hardware has. With
x the unscaled scores and s = x * width^-0.5 * log2(e):

    p = 2^(s1 - shift)    g = softplus / log(2) = log2(1 + 2^s2)

Factors that are the same for a whole sum wait until its end.
"""

import dataclasses
import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_lm.kernels import mosaic_gpu
from sparse_lm.kernels.spark_attention import gpu_form
from sparse_lm.kernels.spark_attention.xla import threshold

_LOG2_E = math.log2(math.e)
_TILE = gpu_form.TILE


@dataclasses.dataclass(frozen=True)
class _Spec:
  """What is known when compiling."""

  predictor_dim: int
  top_k: int
  softcap: float


def unsupported(query_BxKxGxLxE: jax.Array, value_BxKxLxE: jax.Array,
                predictor_dim: int) -> str | None:
  """As `api.unsupported`."""
  *_, length, width = query_BxKxGxLxE.shape
  if {query_BxKxGxLxE.dtype, value_BxKxLxE.dtype} != {jnp.dtype(jnp.bfloat16)}:
    return (f"needs bfloat16, not {query_BxKxGxLxE.dtype} and "
            f"{value_BxKxLxE.dtype}")
  unit = gpu_form.COMPUTE * _TILE
  if length % unit:
    return f"needs a multiple of {unit} tokens, not {length}"
  if width % 64 or predictor_dim % 64 or width > 256:
    return (f"needs head dims in multiples of 64 up to 256, not "
            f"{predictor_dim} of {width}")
  if value_BxKxLxE.shape[-1] != width:
    return f"needs values of {width} dims, not {value_BxKxLxE.shape[-1]}"
  return None


def _multiply(*products):
  """x y' of each pair, (64, 64) in float32."""
  def multiply(*accumulators):
    for accumulator, (x, y) in zip(accumulators, products):
      plgpu.wgmma(accumulator, x, plgpu.transpose_ref(y, (1, 0)))
    plgpu.wgmma_wait(0)
    return [accumulator[...] for accumulator in accumulators]

  shape = plgpu.ACC((_TILE, _TILE), jnp.float32)
  return pl.run_scoped(multiply, *[shape] * len(products))


def _for_rows(number: float):
  """It, for each row."""
  return plgpu.layout_cast(jnp.full((_TILE,), number, jnp.float32),
                           gpu_form.ROW)


class _Scores:
  """Of a tile of rows against a tile of columns."""

  def __init__(self, spec: _Spec, width: int):
    self.spec = spec
    self.widths = spec.predictor_dim, width - spec.predictor_dim
    self.predict, self.rest = (pl.ds(first, size) for first, size in zip(
        (0, spec.predictor_dim), self.widths))
    self.scales = [size**-0.5 for size in self.widths]

  def masked(self, x, work: gpu_form.Work, step):
    """Scores 1, -inf where a key is not seen."""
    def part(first, carry, x):
      seen = work.side.seen(step, first, gpu_form.PART)
      return carry, jnp.where(seen, x, -jnp.inf)

    def mask(x):
      return gpu_form.by_parts(part, x)[1]

    return lax.cond(work.side.is_whole(step), lambda x: x, mask, x)

  def softmax(self, x, floor, shift):
    """p of masked scores 1, and 1.0 for keys that are kept."""
    kept = jnp.where(x >= floor, 1.0, 0.0)
    cap, scale = self.spec.softcap, self.scales[0] * _LOG2_E
    if cap:
      # From exponentials: the hardware's tanh has 11 bits.
      x = 1.0 - 2.0 * jnp.exp2(-mosaic_gpu.log2(
          1.0 + jnp.exp2(x * (2 * scale / cap))))
      scale = cap * _LOG2_E
    return kept * jnp.exp2(x * scale - shift), kept

  def slope(self, p, shift):
    """p times the slope of the cap."""
    if not self.spec.softcap:
      return p
    tanh = (mosaic_gpu.log2(p) + shift) * (1 / (self.spec.softcap * _LOG2_E))
    return p * jnp.maximum(1.0 - tanh * tanh, 0.0)

  def gate(self, x):
    """Scores 2 in base 2, and softplus of them."""
    y = x * (self.scales[1] * _LOG2_E)
    soft = mosaic_gpu.log2(1.0 + jnp.exp2(jnp.minimum(y, -y)))
    return y, jnp.maximum(y, 0.0) + soft


def _accumulate(total, x, y) -> None:
  """Starts total += x y, with x in registers."""
  plgpu.wgmma(total, x, y)


def _measure(work: gpu_form.Work) -> None:
  """Sums of scores and squares about the center, the best, how many seen."""
  side = work.side
  center = gpu_form.spread(work.row_numbers[0], 0, _TILE)

  def step(i, wait, release, carry):
    rows, = work.tiles(i)
    x, = _multiply((rows, wait(0)))
    release(0)
    off = x - center

    def whole(x, off):
      return (off.sum(1), (off * off).sum(1), x.max(1),
              _for_rows(_TILE))

    def part(x, off):
      seen = side.seen(i)
      off = jnp.where(seen, off, 0.0)
      return (off.sum(1), (off * off).sum(1),
              jnp.where(seen, x, -jnp.inf).max(1),
              jnp.where(seen, 1.0, 0.0).sum(1))

    total, squares, best, visible = lax.cond(side.is_whole(i), whole, part, x,
                                             off)
    return (carry[0] + total, carry[1] + squares, jnp.maximum(carry[2], best),
            carry[3] + visible)

  zero = _for_rows(0)
  sums = work.loop(1, step, (zero, zero, zero - jnp.inf, zero))
  for gmem, x in zip(work.results, sums):
    mosaic_gpu.store(gmem.at[side.rows()], x)


def _mix(scores: _Scores, work: gpu_form.Work) -> None:
  """Weights times what passes by: a query's values, a value's gradient."""
  over_keys = work.side.over_keys

  def run(mixed):
    def step(i, wait, release, sums):
      rows, = work.tiles(i)
      columns = wait(0)
      x_1, x_2 = _multiply(*((rows.at[:, dims], columns.at[:, dims])
                             for dims in (scores.predict, scores.rest)))
      release(0)
      numbers = work.numbers(i)

      def part(first, sums, x_1, x_2):
        p, kept = scores.softmax(x_1, *(numbers(j, first) for j in (0, 1)))
        if over_keys:
          sums = sums[0] + p, sums[1] + kept
        return sums, (p * scores.gate(x_2)[1]).astype(jnp.bfloat16)

      sums, weights = gpu_form.by_parts(part, scores.masked(x_1, work, i), x_2,
                                carry=sums)
      _accumulate(mixed, weights, wait(1))
      plgpu.wgmma_wait(0)
      release(1)
      return sums

    # By columns, and added up at the end.
    zero = plgpu.layout_cast(
        jnp.zeros((_TILE, gpu_form.PART), jnp.float32), plgpu.Layout.WGMMA)
    sums = work.loop(2, step, (zero, zero) if over_keys else ())
    return mixed[...], *(x.sum(1) for x in sums)

  mixed, *sums = pl.run_scoped(run, plgpu.ACC(work.shape, jnp.float32))
  mixed *= 1 / _LOG2_E
  if over_keys:
    mixed /= lax.broadcast_in_dim(sums[0], mixed.shape, (0,))
    for gmem, x in zip(work.results[1:], sums):
      mosaic_gpu.store(gmem.at[work.side.rows()], x)
  work.write(slice(None), mixed)
  work.send()


def _pull(scores: _Scores, work: gpu_form.Work) -> None:
  """The gradient of queries, or of keys."""
  predict, rest = scores.predict, scores.rest

  def run(d_1, d_2):
    def step(i, wait, release, carry):
      rows, other = work.tiles(i)
      columns = wait(0)
      x_1, x_2 = _multiply(*((rows.at[:, dims], columns.at[:, dims])
                             for dims in (predict, rest)))
      numbers = work.numbers(i)

      def weigh(first, carry, x_1):
        p, _ = scores.softmax(x_1, *(numbers(j, first) for j in (0, 1)))
        return carry, p.astype(jnp.bfloat16)

      # To 8 bits, as what is made of it will be: it waits in registers.
      _, p = gpu_form.by_parts(weigh, scores.masked(x_1, work, i))
      a, = _multiply((other, wait(1)))
      release(1)

      def part(first, carry, x_2, a, p):
        y, gate = scores.gate(x_2)
        p = p.astype(jnp.float32)
        slope = scores.slope(p, numbers(1, first))
        # 2^(y - gate) is the slope of softplus, a sigmoid.
        parts = (slope * (gate * a - numbers(2, first)),
                 p * a * jnp.exp2(y - gate))
        return carry, *(x.astype(jnp.bfloat16) for x in parts)

      _, to_1, to_2 = gpu_form.by_parts(part, x_2, a, p)
      _accumulate(d_1, to_1, columns.at[:, predict])
      _accumulate(d_2, to_2, columns.at[:, rest])
      plgpu.wgmma_wait(0)
      release(0)
      return carry

    work.loop(2, step, ())
    return d_1[...], d_2[...]

  d_1, d_2 = pl.run_scoped(run, *[plgpu.ACC((_TILE, width), jnp.float32)
                                  for width in scores.widths])
  work.write(predict, d_1 * (scores.scales[0] / _LOG2_E))
  work.write(rest, d_2 * scores.scales[1])
  work.send()


def _statistics(query, key, places: gpu_form.Places, spec: _Spec):
  """floor and best (B, K, G, L) of unscaled scores; visible (B, L)."""
  p = spec.predictor_dim
  query_1, key_1 = (x[..., :p].astype(jnp.float32) for x in (query, key))
  center = jnp.einsum("bkgle,bke->bkgl", query_1, key_1.mean(2),
                      precision="highest")
  number = jax.ShapeDtypeStruct(center.shape, jnp.float32)
  total, squares, best, count = gpu_form.run(
      _measure, True, places, (query,), (key,), (center,), (number,) * 4, p)
  visible = count[:, 0, 0].astype(jnp.int32)
  theta = threshold(center, total, squares, visible, spec.top_k, key.shape[2])
  # As there: by so much the best score may fall short, computed again.
  slack = 8 * jnp.finfo(jnp.float32).eps * jnp.linalg.norm(
      key_1, axis=-1).mean(2)[..., None, None] * jnp.linalg.norm(
          query_1, axis=-1)
  # What no query sees has the score -inf, below every floor.
  lowest = jnp.finfo(jnp.float32).min
  return jnp.maximum(jnp.minimum(theta, best - slack), lowest), best, visible


def _forward(query, key, value, places, spec):
  floor, best, visible = _statistics(query, key, places, spec)
  scale = spec.predictor_dim**-0.5
  shift = best * scale
  if spec.softcap:
    shift = spec.softcap * jnp.tanh(shift / spec.softcap)
  shift *= _LOG2_E
  width = query.shape[-1]
  number = jax.ShapeDtypeStruct(floor.shape, jnp.float32)
  out, normalizer, count = gpu_form.run(
      functools.partial(_mix, _Scores(spec, width)), True, places, (query,),
      (key, value), (floor, shift),
      (jax.ShapeDtypeStruct(query.shape, query.dtype), number, number), width)
  log_sum = shift + jnp.log2(normalizer)
  return (out, count.mean((1, 2)), visible), (floor, log_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, places, spec):
  """Mixed values, keys kept, keys seen."""
  return _forward(query, key, value, places, spec)[0]


def _attend_fwd(query, key, value, places, spec):
  out, statistics = _forward(query, key, value, places, spec)
  return out, (query, key, value, places, out[0], *statistics)


def _attend_bwd(spec, residuals, gradients):
  query, key, value, places, out, floor, log_sum = residuals
  d_out, width = gradients[0], query.shape[-1]
  inner = _LOG2_E * (d_out.astype(jnp.float32) * out.astype(jnp.float32)
                     ).sum(-1)
  scores = _Scores(spec, width)

  def run(compute, over_keys, rows, passing, numbers):
    like = jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)
    return gpu_form.run(functools.partial(compute, scores), over_keys, places,
                        rows, passing, numbers, like, width)

  statistics = floor, log_sum
  d_query = run(_pull, True, (query, d_out), (key, value), (*statistics, inner))
  d_key = run(_pull, False, (key, value), (query, d_out), (*statistics, inner))
  d_value = run(_mix, False, (key,), (query, d_out), statistics)
  return d_query, d_key, d_value, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def spark_attention(query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, positions_BxL,
                    segments_BxL, window, predictor_dim, top_k, softcap,
                    block_q, block_k):
  """As `api.spark_attention`; its blocks are its own."""
  del block_q, block_k
  places = gpu_form.locate(positions_BxL, segments_BxL, window,
                   query_BxKxGxLxE.shape[2])
  return _attend(query_BxKxGxLxE, key_BxKxLxE, value_BxKxLxE, places,
                 _Spec(predictor_dim, top_k, softcap))
