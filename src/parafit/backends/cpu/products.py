"""Products of matrices: kernel gradients of dense layers, bfloat16 operands."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn


def choose_dot(equation: JaxprEqn) -> Callable | None:
    """A product in the order of operations, or in the precision, that XLA:CPU runs best; None where its own form is kept."""
    sums, batch = equation.params["dimension_numbers"]
    left, right = (var.aval for var in equation.invars)
    if left.dtype != right.dtype or not jnp.issubdtype(left.dtype, jnp.floating) or equation.params["out_sharding"]:
        return None
    leading = batch == ((), ()) and sums[0] == sums[1] and set(sums[0]) == set(range(len(sums[0])))
    return (leading and _leading_product_form(equation)) or _half_precision_form(equation)


def _half_precision_form(equation: JaxprEqn) -> Callable | None:
    """XLA:CPU uses the processor's bfloat16 products only where the result is float32 (JAX 0.10.2); both round once, at the end."""
    left, result = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    if left != jnp.bfloat16 or result not in (jnp.bfloat16, jnp.float32):
        return None
    dims, precision = equation.params["dimension_numbers"], equation.params["precision"]
    return lambda left, right: _half_product(left, right, dims, precision).astype(result)


def _half_product(left: jax.Array, right: jax.Array, dimension_numbers, precision=None) -> jax.Array:
    """A float32 product of bfloat16 operands in the form that XLA:CPU gives to the processor: the left operand summed over its last dim.

    Dims of the batch stay apart, for they may be split over devices.
    """
    (sums, right_sums), (batch, right_batch) = dimension_numbers
    free, right_free = _others(left, sums, batch), _others(right, right_sums, right_batch)
    turned = _lies(right, (*right_batch, *right_free, *right_sums))
    one = _matrices(left, batch, free, sums)
    other = _matrices(right, right_batch, *((right_free, right_sums) if turned else (right_sums, right_free)))
    product = _matrix_product(one, other, turned, precision)
    return product.reshape(*(left.shape[dim] for dim in (*batch, *free)), *(right.shape[dim] for dim in right_free))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _matrix_product(left: jax.Array, right: jax.Array, turned: bool, precision) -> jax.Array:
    """left (..., rows, inner) times right (..., inner, columns), or (..., columns, inner) if `turned`.

    XLA:CPU (JAX 0.10.2) first chooses how to run a product, by how its operands lie in memory, and then moves transposes into it, which may
    end in "Unsupported element type for DotThunk: BF16 x BF16 = F32". Arguments of a function of its own lie as they are written, and the
    barriers keep transposes out.
    """
    batch = tuple(range(left.ndim - 2))
    dims = ((left.ndim - 1,), (left.ndim - 2 + turned,)), (batch, batch)
    left, right = lax.optimization_barrier((left, right))
    return lax.optimization_barrier(lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32))


def _others(array: jax.Array, *taken: Sequence[int]) -> tuple[int, ...]:
    return tuple(dim for dim in range(array.ndim) if not any(dim in dims for dims in taken))


def _lies(array: jax.Array, dims: Sequence[int]) -> bool:
    return tuple(dims) == tuple(range(array.ndim))


def _matrices(array: jax.Array, batch: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> jax.Array:
    """The array as (*batch, rows, columns), rows and columns each of several dims."""
    sizes = [array.shape[dim] for dim in batch] + [math.prod(array.shape[dim] for dim in dims) for dims in (rows, columns)]
    return lax.transpose(array, (*batch, *rows, *columns)).reshape(sizes)


def _leading_product_form(equation: JaxprEqn) -> Callable | None:
    """A product summed over the leading dims of both operands: how a dense kernel's gradient is written."""
    left, right = (var.aval for var in equation.invars)
    leading = len(equation.params["dimension_numbers"][0][0])
    terms, rows, columns = math.prod(left.shape[:leading]), math.prod(left.shape[leading:]), math.prod(right.shape[leading:])
    plain = left.dtype != jnp.bfloat16 and leading == 1 and _product_form(terms, rows, columns) is _plain_product
    if min(rows, columns, terms) < 2 or plain:
        return None
    options = {name: equation.params[name] for name in ("precision", "preferred_element_type")}

    def form(left, right):
        product = kernel_gradient(left.reshape(terms, rows), right.reshape(terms, columns), **options)
        return product.reshape(left.shape[leading:] + right.shape[leading:])

    return form


def product(left: jax.Array, right: jax.Array, sums: tuple[Sequence[int], Sequence[int]], *, precision=None, preferred_element_type=None):
    """The product of two arrays: the other dimensions of left, then those of right.

    Args:
        left, right: arrays of one dtype.
        sums: the dimensions of each that are summed over.
        precision, preferred_element_type: as in `jax.lax.dot_general`.
    """
    dims = sums, ((), ())
    if left.dtype == jnp.bfloat16:
        return _half_product(left, right, dims, precision).astype(preferred_element_type or left.dtype)
    return lax.dot_general(left, right, dims, precision=precision, preferred_element_type=preferred_element_type)


def kernel_gradient(left: jax.Array, right: jax.Array, **options) -> jax.Array:
    """leftᵀ right, in the order of operations that XLA:CPU runs best.

    Args:
        left: array of shape (terms, rows).
        right: array of shape (terms, columns).
        options: `precision` and `preferred_element_type`, as in `jax.lax.dot_general`.
    """
    terms, rows = left.shape
    if left.dtype == jnp.bfloat16:
        return _half_kernel_gradient(left, right, **options)
    return _product_form(terms, rows, right.shape[1])(left, right, **options)


def _half_kernel_gradient(left: jax.Array, right: jax.Array, *, precision=None, preferred_element_type=None) -> jax.Array:
    """The same for bfloat16 operands; the smaller one is copied."""
    dims = (((0,), (0,)), ((), ()))
    swapped = 2 * right.shape[1] <= left.shape[1]
    product = _half_product(right, left, dims, precision).T if swapped else _half_product(left, right, dims, precision)
    return product.astype(preferred_element_type or left.dtype)


def _product_form(terms: int, rows: int, columns: int) -> Callable:
    """Measured in the steps of networks on 2 cores of a Zen 4, some on a Zen 5 (JAX 0.10.2).

    Few rows are best, above all in long sums, and a small transposed copy. The gradient of a wide kernel is left as it is in short sums:
    the optimiser reads it several times, and slowly where it lies transposed.
    """
    wide = min(rows, columns) >= 128
    inner = _copied_product if not wide and terms * min(rows, columns) <= 2**13 else _plain_product
    if terms < 2**12 and (max(rows, columns) < 2 * min(rows, columns) or rows * columns > 2**17 or (wide and terms < 2**10)):
        return inner
    if rows < columns:
        return lambda left, right, **options: lax.optimization_barrier(inner(left, right, **options))
    return lambda left, right, **options: lax.optimization_barrier(inner(right, left, **options)).T


def _plain_product(left, right, **options):
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())), **options)


def _copied_product(left, right, **options):
    return lax.dot_general(lax.optimization_barrier(left.T), right, (((1,), (0,)), ((), ())), **options)
