"""Work on the bits of numbers: the largest few of some, and random ones."""

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

MOST_TOP_PASSES = 128
"""`top_k` is left alone if k times the number of candidates is more than this: the form below takes two passes for each value."""


def choose_top_k(equation: JaxprEqn) -> Callable | None:
    """`top_k` of few candidates in float32 or less, as one maximum after the other; None where XLA's own form is kept."""
    operand, count, axis = equation.invars[0].aval, equation.params["k"], equation.params["axis"]
    kinds = jnp.float32, jnp.float16, jnp.bfloat16
    if count * operand.shape[axis] > MOST_TOP_PASSES or operand.dtype not in kinds or axis != len(operand.shape) - 1:
        return None

    def form(values):
        keys = _ordered_keys(values.astype(jnp.float32))
        places = lax.broadcasted_iota(jnp.int32, values.shape, axis)
        best, indices = [], []
        for _ in range(count):
            place = jnp.where(keys == keys.max(axis, keepdims=True), places, values.shape[axis]).min(axis, keepdims=True)
            best.append(jnp.where(places == place, values, -jnp.inf).max(axis, keepdims=True))
            indices.append(place)
            keys = jnp.where(places == place, jnp.iinfo(jnp.int32).min, keys)
        return jnp.concatenate(best, axis), jnp.concatenate(indices, axis)

    return form


def _ordered_keys(values: jax.Array) -> jax.Array:
    """Integers in XLA's order of float32 numbers: by sign, then by bits, so that -0 < 0 and inf < nan. The smallest integer is none."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return jnp.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), jnp.iinfo(jnp.int32).min + 1)


def choose_random_bits(equation: JaxprEqn) -> Callable | None:
    """32 random bits a number, drawn for two halves of an array at once; None where XLA's own form is kept."""
    key, shape, width = equation.invars[0].aval, equation.params["shape"], equation.params["bit_width"]
    ours = str(key.dtype) == "key<fry>" and key.shape == () and width == 32 and jax.config.jax_threefry_partitionable
    if not ours or not 0 < math.prod(shape) < 2**32:
        return None

    size = math.prod(shape)
    half = -(-size // 2)

    def form(key):
        places, words = lax.iota(jnp.uint32, half), jax.random.key_data(key)
        # A loop, because its result is kept: without, the backward pass computes the bits again.

        def draw(start):
            return functools.reduce(operator.xor, _threefry(words[0], words[1], jnp.zeros_like(places), start + places))

        halves = lax.map(draw, np.array([0, half], np.uint32))
        return halves.reshape(-1)[:size].reshape(shape)

    return form


def choose_threefry(equation: JaxprEqn) -> Callable | None:
    """Threefry of many counts, such as those of some rows of a draw, in two halves; None where JAX's own form is kept."""
    shape = equation.outvars[0].aval.shape
    size, whole = math.prod(shape), [var.aval.shape == shape for var in equation.invars]
    if size < LEAST_COUNTS or any(var.aval.shape and not counted for var, counted in zip(equation.invars, whole)):
        return None

    def form(*words):
        half = -(-size // 2)
        halves = [jnp.resize(word.reshape(-1), (2 * half,)).reshape(2, half) for word, counted in zip(words, whole) if counted]

        def draw(some):  # in a loop, as above
            counts = iter(some)
            return _threefry(*(next(counts) if counted else word for word, counted in zip(words, whole)))

        return tuple(found.reshape(-1)[:size].reshape(shape) for found in lax.map(draw, halves))

    return form


LEAST_COUNTS = 256
"""Fewer counts than this, such as those that split a key, are left alone: JAX's loop is less to compile."""


def _threefry(key: jax.Array, other: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds, written out: JAX's own loop of five passes goes through memory ten times.

    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).

    Args:
        key, other: the words of the key.
        high, low: those of the counts.
    """
    schedule = key, other, key ^ other ^ np.uint32(0x1BD11BDA)
    first, second = (jnp.broadcast_to(word, jnp.shape(low)) for word in (high + key, low + other))
    for turn in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            first = first + second
            second = first ^ ((second << np.uint32(distance)) | (second >> np.uint32(32 - distance)))
        first = first + schedule[(turn + 1) % 3]
        second = second + schedule[(turn + 2) % 3] + np.uint32(turn + 1)
    return first, second
