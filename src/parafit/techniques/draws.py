"""Random numbers of some rows: those that belong to them in a draw for all rows of a batch.

Partitionable threefry counts elements: element i of a draw depends on the key and on i alone, so rows can be drawn by themselves. Of
other generators all rows are drawn, and some are kept.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p


def bits_of_rows(key: jax.Array, numbers: jax.Array, *, shape: tuple[int, ...], dim: int, rows: int, bit_width: int) -> jax.Array:
    """`jax.random.bits(key, shape)` at some rows.

    Args:
        key: one random key.
        numbers: of the rows, int32, of shape (n,).
        shape: of the whole draw.
        dim: the dimension that holds the rows, several places of it one after the other for each where it is a multiple of them.
        rows: of the batch.
        bit_width: of a number: 8, 16, 32 or 64.

    >>> key, numbers = jax.random.key(0), jnp.array([2, 3])
    >>> some = bits_of_rows(key, numbers, shape=(4, 3), dim=0, rows=4, bit_width=32)
    >>> bool((some == jax.random.bits(key, (4, 3))[2:]).all())
    True
    """
    places = places_of_rows(numbers, shape[dim] // rows)
    counted = str(key.dtype) == "key<fry>" and key.shape == () and jax.config.jax_threefry_partitionable
    if not counted or math.prod(shape) >= 2**32:
        drawn = jax.random.bits(key, (*key.shape, *shape)[key.ndim :], f"uint{bit_width}")
        return jnp.take(drawn, places, axis=dim)
    return _bits(key, _counts(places, shape, dim), bit_width)


def places_of_rows(numbers: jax.Array, each: int) -> jax.Array:
    """Where rows are in a dimension that holds so many places of each row."""
    return numbers if each == 1 else (numbers[:, None] * each + jnp.arange(each, dtype=numbers.dtype)).reshape(-1)


def _counts(places: jax.Array, shape: tuple[int, ...], dim: int) -> jax.Array:
    """The numbers, in the whole draw, of the elements at these places of one dimension."""
    some = (*shape[:dim], places.shape[0], *shape[dim + 1 :])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    total: Any = jnp.uint32(0)
    for axis, stride in enumerate(strides):
        along = places.astype(jnp.uint32) if axis == dim else jnp.arange(shape[axis], dtype=jnp.uint32)
        total = total + jax.lax.broadcast_in_dim(along * np.uint32(stride), some, (axis,))
    return total


def _bits(key: jax.Array, counts: jax.Array, bit_width: int) -> jax.Array:
    words = jax.random.key_data(key)
    first, second = (jnp.broadcast_to(word, counts.shape) for word in words)
    high, low = threefry2x32_p.bind(first, second, jnp.zeros_like(counts), counts)
    if bit_width < 64:
        return (high ^ low).astype(f"uint{bit_width}")
    return high.astype("uint64") << 32 | low.astype("uint64")
