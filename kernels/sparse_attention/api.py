"""One signature for every implementation of sparse attention.

Letters beside the README's: U = E - P, the head dims that do not predict.
"""

import jax

from sparse_lm.kernels.devices import generation
from sparse_lm.kernels.implementations import loader

# By name, the module that has it.
# `reference` is what the others are tested against.
IMPLEMENTATIONS: dict[str, str] = {
    "xla": "xla", "pallas_gpu": "gpu", "pallas_tpu": "tpu",
    "reference": "reference"}
_module = loader("sparse_attention", IMPLEMENTATIONS)
# Below so many slots, reading all keys is as fast on 2 CPU cores.
_MIN_SLOTS = 2048


def choose(device: jax.Device, top_k: int, query_BxKxGxE: jax.Array,
           key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
           value_BxKxSxE: jax.Array) -> str | None:
  """The implementation that is faster than reading every key.

  Args:
    device: where it is to run.
    top_k: keys that a query aims to keep.
    query_BxKxGxE: as `sparse_attention` has it; shapes and types alone matter.
    key1_BxKxSxP: likewise.
    key2_BxKxSxU: likewise.
    value_BxKxSxE: likewise.

  Returns:
    A key of `IMPLEMENTATIONS`; None where there is none: on other GPUs than
    Hopper XLA's loop over blocks would start a program for each, and
    "pallas_tpu" has been compiled but not yet timed on a TPU.
  """
  arrays = query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE
  if generation(device) == 9 and not unsupported("pallas_gpu", *arrays):
    return "pallas_gpu"
  # No two queries of a group need keep the same keys.
  group, slots = query_BxKxGxE.shape[2], key1_BxKxSxP.shape[2]
  fast = slots >= max(_MIN_SLOTS, 4 * group * top_k)
  return "xla" if device.platform == "cpu" and fast else None


def unsupported(implementation: str, query_BxKxGxE: jax.Array,
                key1_BxKxSxP: jax.Array, key2_BxKxSxU: jax.Array,
                value_BxKxSxE: jax.Array) -> str | None:
  """Why an implementation cannot serve, None where it can.

  Args:
    implementation: a key of `IMPLEMENTATIONS`.
    query_BxKxGxE: as `sparse_attention` has it; shapes and types alone matter.
    key1_BxKxSxP: likewise.
    key2_BxKxSxU: likewise.
    value_BxKxSxE: likewise.
  """
  check = getattr(_module(implementation), "unsupported", None)
  return check and check(query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU,
                         value_BxKxSxE)


def sparse_attention(query_BxKxGxE: jax.Array, key1_BxKxSxP: jax.Array,
                     key2_BxKxSxU: jax.Array, value_BxKxSxE: jax.Array,
                     lengths_B: jax.Array, *, window: jax.Array | int,
                     top_k: int, logit_softcap: float = 0.0,
                     implementation: str = "xla"
                     ) -> tuple[jax.Array, jax.Array]:
  """softmax(kept keys' first scores) * softplus(second scores), times values.

  Spark attention (arXiv 2506.06644, Eq. 7) of one query a row to a cache whose
  keys lie in two parts. The first is read whole. Of the second, and of the
  values, only what some query of the group keeps, however many that are: keys
  whose score reaches mean + std * Q(1 - k/n) of the n visible ones, all where
  n <= k, and always the best. Each part's scores are scaled by its width^-0.5.
  Sums are in float32.

  Args:
    query_BxKxGxE: one query for each row and head, both parts.
    key1_BxKxSxP: the keys' first part; slot s is position s.
    key2_BxKxSxU: the rest of them.
    value_BxKxSxE: the values.
    lengths_B: how many positions of each row are filled, the query's included.
    window: how many tokens the query sees, itself included; may be traced.
    top_k: about how many keys a query keeps.
    logit_softcap: cap * tanh(score / cap) before the softmax; 0: off.
    implementation: a key of `IMPLEMENTATIONS`.

  Returns:
    The mixed values (B, K, G, E) in the query's type, and how many keys each
    query keeps, (B, K, G), int32.

  Raises:
    ValueError: on an unknown implementation, or shapes that do not fit.
  """
  call = _module(implementation).sparse_attention
  b, k, _, e = query_BxKxGxE.shape
  s, p = key1_BxKxSxP.shape[2:]
  for name, array, shape in (
      ("key1_BxKxSxP", key1_BxKxSxP, (b, k, s, p)),
      ("key2_BxKxSxU", key2_BxKxSxU, (b, k, s, e - p)),
      ("value_BxKxSxE", value_BxKxSxE, (b, k, s, e)),
      ("lengths_B", lengths_B, (b,))):
    if array.shape != shape:
      raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
  if top_k < 1:
    raise ValueError(f"top_k={top_k} must be above 0")
  reason = unsupported(implementation, query_BxKxGxE, key1_BxKxSxP,
                       key2_BxKxSxU, value_BxKxSxE)
  if reason:
    raise ValueError(f"implementation={implementation!r}: {reason}")
  return call(query_BxKxGxE, key1_BxKxSxP, key2_BxKxSxU, value_BxKxSxE,
              lengths_B, window, top_k, logit_softcap)


def write_and_attend(*arrays: jax.Array, **options):
  """See `gpu.write_and_attend`, of "pallas_gpu" alone."""
  return _module("pallas_gpu").write_and_attend(*arrays, **options)
