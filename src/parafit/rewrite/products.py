"""Products of matrices: kernel gradients of dense layers, bfloat16 operands."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn


def choose_dot(equation: JaxprEqn) -> Callable | None:
    sums, batch = equation.params["dimension_numbers"]
    left, right, result = (var.aval for var in (*equation.invars, *equation.outvars))
    if batch != ((), ()) or left.dtype != right.dtype or not jnp.issubdtype(left.dtype, jnp.floating) or equation.params["out_sharding"]:
        return None
    if sums[0] == sums[1] and set(sums[0]) == set(range(len(sums[0]))):
        return _leading_product_form(equation)
    return _half_precision_form(equation) if left.dtype == result.dtype == jnp.bfloat16 else None


def _half_precision_form(equation: JaxprEqn) -> Callable:
    """XLA:CPU uses the processor's bfloat16 products only where the result is float32 (JAX 0.10.2); both round once, at the end."""
    options = {**equation.params, "preferred_element_type": jnp.dtype("float32")}
    return lambda left, right: lax.dot_general(left, right, **options).astype(jnp.bfloat16)


def _leading_product_form(equation: JaxprEqn) -> Callable | None:
    """A product summed over the leading dims of both operands: how a dense kernel's gradient is written."""
    left, right = (var.aval.shape for var in equation.invars)
    leading = len(equation.params["dimension_numbers"][0][0])
    terms, rows, columns = math.prod(left[:leading]), math.prod(left[leading:]), math.prod(right[leading:])
    if min(rows, columns, terms) < 2 or (leading == 1 and _product_form(terms, rows, columns) is _plain_product):
        return None
    options = {name: equation.params[name] for name in ("precision", "preferred_element_type")}

    def form(left, right):
        product = kernel_gradient(left.reshape(terms, rows), right.reshape(terms, columns), **options)
        return product.reshape(left.shape[leading:] + right.shape[leading:])

    return form


def kernel_gradient(left: jax.Array, right: jax.Array, **options) -> jax.Array:
    """leftᵀ right for left (terms, rows), right (terms, columns), in the order of operations that XLA:CPU runs best."""
    terms, rows = left.shape
    return _product_form(terms, rows, right.shape[1])(left, right, **options)


def _product_form(terms: int, rows: int, columns: int) -> Callable:
    """Measured on 2 cores of a Zen 5 (JAX 0.10.2): few rows are best, and a transposed copy while that is small."""
    small = terms * min(rows, columns) <= 2**13
    if max(rows, columns) < 2 * min(rows, columns) or rows * columns > 2**17:
        return _copied_product if small else _plain_product
    inner = _copied_product if small else _plain_product
    if rows < columns:
        return lambda left, right, **options: lax.optimization_barrier(inner(left, right, **options))
    return lambda left, right, **options: lax.optimization_barrier(inner(right, left, **options)).T


def _plain_product(left, right, **options):
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())), **options)


def _copied_product(left, right, **options):
    return lax.dot_general(lax.optimization_barrier(left.T), right, (((1,), (0,)), ((), ())), **options)
