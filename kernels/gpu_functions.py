"""Elementwise functions as Mosaic GPU kernels can have them."""

from collections.abc import Callable

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core
import jax.numpy as jnp

Function = Callable[[jax.Array], jax.Array]

# What activations are made of that kernels have in each version of JAX.
_PRIMITIVES = frozenset((
    "abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type",
    "div", "eq", "exp", "ge", "gt", "integer_pow", "le", "logistic", "lt",
    "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "rsqrt",
    "select_n", "sign", "square", "sub", "tanh"))
# Calls of functions, by the parameter that has the function.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def _inner(equation) -> core.ClosedJaxpr | None:
  """The function that a call calls; None: not a call."""
  name = equation.primitive.name
  return equation.params[_CALLS[name]] if name in _CALLS else None


def _names(jaxpr: core.ClosedJaxpr) -> set[str]:
  """The primitives that a function is made of."""
  names = set()
  for equation in jaxpr.jaxpr.eqns:
    inner = _inner(equation)
    names |= _names(inner) if inner else {equation.primitive.name}
  return names


def _trace(function: Callable, shape: tuple[int, ...]) -> core.ClosedJaxpr:
  return jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))


def unsupported(*functions: Callable) -> str | None:
  """Why kernels cannot have these, None where they can.

  Args:
    *functions: of one array in float32.
  """
  missing = set().union(*(_names(_trace(f, (1, 1))) for f in functions))
  missing -= _PRIMITIVES
  return f"has no {', '.join(sorted(missing))}" if missing else None


def _evaluate(jaxpr: core.ClosedJaxpr, *arguments) -> list[jax.Array]:
  """Calls a function as kernels can: its calls inlined, its sums plain.

  Kernels have neither JAX's addition of gradients nor, in most versions,
  functions with derivatives of their own: `jax.nn.relu` is one.
  """
  values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts))
  values |= zip(jaxpr.jaxpr.invars, arguments)

  def read(x):
    return x.val if isinstance(x, core.Literal) else values[x]

  for equation in jaxpr.jaxpr.eqns:
    inputs, inner = [read(x) for x in equation.invars], _inner(equation)
    if inner:
      outputs = _evaluate(inner, *inputs)
    elif equation.primitive.name == "add_any":
      outputs = [lax.add(*inputs)]
    else:
      outputs = equation.primitive.bind(*inputs, **equation.params)
      outputs = outputs if equation.primitive.multiple_results else [outputs]
    values |= zip(equation.outvars, outputs)
  return [read(x) for x in jaxpr.jaxpr.outvars]


def inlined(function: Callable, layout) -> Callable:
  """It, to be called in a kernel.

  Args:
    function: from an array in float32 to one or more of its shape.
    layout: of all; a constant result has none by itself.
  """
  def call(x: jax.Array):
    outputs = [plgpu.layout_cast(y, layout)
               for y in _evaluate(_trace(function, x.shape), x)]
    return outputs if len(outputs) > 1 else outputs[0]

  return call


def with_slope(function: Function) -> Callable:
  """From x to f(x) and f'(x)."""
  return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))
