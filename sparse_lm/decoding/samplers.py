"""Ways to choose the next token: small objects, called inside jit."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from sparse_lm.errors import UserError


# The least temperature: float32 holds logits divided by it.
_LEAST = 1e-6


class Sampler(Protocol):

  def __call__(self, logits_BxV: jax.Array, key: jax.Array) -> jax.Array:
    """The chosen token of each row, int32 (B,)."""


@dataclasses.dataclass(frozen=True)
class Greedy:
  """The most likely token."""

  def __call__(self, logits_BxV: jax.Array, key: jax.Array) -> jax.Array:
    del key
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Random:
  """A draw from the tempered distribution, cut to its likeliest tokens.

  Attributes:
    temperature: logits are divided by it.
    top_k: only so many tokens; 0: no limit. Ties at the limit all stay.
    top_p: only the smallest set of tokens whose probability reaches this
      (arXiv 1904.09751), of what top_k leaves; 1: no limit.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def allowed(self, logits_BxV: jax.Array) -> jax.Array:
    """Tempered logits, -inf for the tokens that are cut."""
    logits = logits_BxV.astype(jnp.float32) / self.temperature
    if self.top_k and self.top_k < logits.shape[-1]:
      smallest = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
      logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if self.top_p < 1:
      ordered = jnp.sort(logits, axis=-1, descending=True)
      probabilities = jax.nn.softmax(ordered, axis=-1)
      before = jnp.cumsum(probabilities, axis=-1) - probabilities
      last = jnp.sum(before < self.top_p, axis=-1, keepdims=True) - 1
      smallest = jnp.take_along_axis(ordered, last, axis=-1)
      logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return logits

  def __call__(self, logits_BxV: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, self.allowed(logits_BxV)).astype(
        jnp.int32)


def make_sampler(temperature: float, top_k: int = 0,
                 top_p: float = 1.0) -> Sampler:
  """Greedy at temperature 0, else `Random`; `UserError` on a bad value."""
  if not (temperature == 0 or _LEAST <= temperature < math.inf):
    raise UserError(f"--temperature={temperature}: must be 0, or a number of "
                    f"{_LEAST} or more")
  if top_k < 0:
    raise UserError(f"--top_k={top_k}: must not be negative")
  if not 0 < top_p <= 1:
    raise UserError(f"--top_p={top_p}: must be in (0, 1]")
  return Random(temperature, top_k, top_p) if temperature else Greedy()
