"""Slices that windows of convolutions and pools are made of."""

from collections.abc import Sequence

import jax
from jax import lax

MOST_OFFSETS = 64
"""Windows of more positions than this are left alone: the forms below grow with each position."""


def strided(array: jax.Array, starts: Sequence[int], sizes: Sequence[int], strides: Sequence[int], first: int = 1) -> jax.Array:
    """An array's entries at equal distances along several dimensions.

    Args:
        array: array of any shape.
        starts: index of the first entry along each dimension.
        sizes: number of entries along each dimension.
        strides: distance from one entry to the next along each dimension.
        first: index of the first of the dimensions.
    """
    for dim, (start, size, stride) in enumerate(zip(starts, sizes, strides), first):
        array = every(array, start, size, stride, dim)
    return array


def every(array: jax.Array, start: int, size: int, stride: int, dim: int) -> jax.Array:
    """`strided` along one dimension.

    Args:
        array: array of any shape.
        start: index of the first entry.
        size: number of entries.
        stride: distance from one entry to the next.
        dim: index of the dimension.
    """
    return lax.slice_in_dim(array, start, start + (size - 1) * stride + 1, stride, dim)
