"""Pooling and its gradients."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from parafit.backends.cpu.windows import MOST_OFFSETS, strided

_MANY_CHANNELS = 16
"""Fewer make loops that XLA:CPU does not vectorise where it works out for every pixel which position of its window it is (JAX 0.10.2)."""


def choose_pool_gradient(equation: JaxprEqn) -> Callable | None:
    """The gradient of a maximum over windows, spread by shifted copies of it; None where XLA's own form is kept."""
    params = equation.params
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    if params["select_prim"].name != "ge" or math.prod(window) > MOST_OFFSETS:
        return None
    tiled = tuple(window) == tuple(strides) and not any(map(any, padding))
    channels = math.prod(equation.outvars[0].aval.shape[_last_dim(window) + 1 :])

    def form(gradient, images):
        gradient = gradient.astype(images.dtype)
        chosen = _chosen(images, gradient.shape, window, strides, padding)
        spread = _spread if not tiled else _spread_tiled if channels >= _MANY_CHANNELS else _spread_few
        return spread(gradient, chosen, images.shape, window, strides, padding)

    return form


def _chosen(images: jax.Array, shape: Sequence[int], window, strides, padding) -> jax.Array:
    """The number of the position that each window's maximum came from: as in XLA, a later one wins unless the earlier is ≥ it."""
    value: Any = None
    chosen = jnp.full(shape, -1, jnp.int32)
    widths = [(low, high, 0) for low, high in padding]
    padded = lax.pad(images, jnp.zeros((), images.dtype), widths)
    inside = lax.pad(jnp.ones(images.shape, bool), False, widths) if any(map(any, padding)) else None
    for number, starts in enumerate(itertools.product(*map(range, window))):
        candidate = strided(padded, starts, shape, strides, first=0)
        keep = jnp.zeros(shape, bool) if value is None else (chosen >= 0) & (value >= candidate)
        if inside is not None:
            keep = keep | ~strided(inside, starts, shape, strides, first=0)
        value = candidate if value is None else jnp.where(keep, value, candidate)
        chosen = jnp.where(keep, chosen, number)
    return chosen


def _spread_tiled(gradient, chosen, shape, window, strides, padding):
    """Windows that tile the images: each position asks whether it was chosen."""
    blocks = [length for count in gradient.shape for length in (count, 1)]
    within = [length for width in window for length in (1, width)]
    number: Any = 0  # of the window alone: numbers for every pixel would be stored through all steps
    for dim, width in enumerate(window):
        number = number * width + lax.broadcasted_iota(jnp.int32, within, 2 * dim + 1)
    tiles = jnp.where(chosen.reshape(blocks) == number, gradient.reshape(blocks), jnp.zeros((), gradient.dtype))
    return _covering(tiles.reshape([count * width for count, width in zip(gradient.shape, window)]), shape)


def _spread_few(gradient, chosen, shape, window, strides, padding):
    """Windows that tile images of few channels: the gradients of each position by themselves, then laid side by side."""
    numbers, last = itertools.count(), _last_dim(window)

    def join(dim: int) -> jax.Array:
        if dim == len(window):
            return jnp.where(chosen == next(numbers), gradient, jnp.zeros((), gradient.dtype))
        parts = [join(dim + 1) for _ in range(window[dim])]
        if dim == last:  # pixels with all their channels
            return jnp.concatenate([part.reshape(*part.shape[: dim + 1], -1) for part in parts], axis=-1)
        return jnp.stack(parts, axis=dim + 1)

    return _covering(join(0).reshape([count * width for count, width in zip(gradient.shape, window)]), shape)


def _last_dim(window) -> int:
    """The last dim that windows extend in."""
    return max((dim for dim, width in enumerate(window) if width > 1), default=0)


def _covering(whole, shape):
    """Zeros where windows that tile do not reach."""
    return lax.pad(whole, jnp.zeros((), whole.dtype), [(0, size - covered, 0) for size, covered in zip(shape, whole.shape)])


def _spread(gradient, chosen, shape, window, strides, padding):
    """Windows that overlap or leave gaps: the last position first, so that sums run over the windows in XLA's order."""
    widths = [
        (width - 1, size + low + high - (count - 1) * stride - 1, stride - 1)
        for width, size, count, stride, (low, high) in zip(window, shape, gradient.shape, strides, padding)
    ]
    gradient = lax.optimization_barrier(lax.pad(gradient, jnp.zeros((), gradient.dtype), widths))
    chosen = lax.optimization_barrier(lax.pad(chosen, jnp.int32(-1), widths))
    ones = [1] * len(shape)
    total: Any = None
    for number, starts in reversed(list(enumerate(itertools.product(*map(range, window))))):
        corner = [width - 1 - start + low for width, start, (low, _) in zip(window, starts, padding)]
        here = strided(chosen, corner, shape, ones, first=0) == number
        part = jnp.where(here, strided(gradient, corner, shape, ones, first=0), jnp.zeros((), gradient.dtype))
        total = part if total is None else total + part
    return total


def choose_pool(equation: JaxprEqn, *, alone: bool = True) -> Callable | None:
    """A maximum or sum over windows, as one over shifted copies: what comes before, a ReLU say, then needs no pass of its own.

    XLA's own form stays where it is faster: large or padded windows side by side, and all that may run as one with their neighbours (not
    `alone`); sums of few shifts by one.

    Args:
        equation: the pooling.
        alone: whether it is an operation by itself, rather than one that may run as one with its neighbours.
    """
    params, operand = equation.params, equation.invars[0].aval
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    join, start = _JOINS[equation.primitive.name]
    padded, size = any(map(any, padding)), math.prod(window)
    tiled = tuple(window) == tuple(strides)
    spared = (size > 9 or padded or not alone) if tiled else join is jnp.add and math.prod(strides) == 1 and size <= 4
    if dilated or spared or not 1 < size <= MOST_OFFSETS or not jnp.issubdtype(operand.dtype, jnp.floating):
        return None
    shape = equation.outvars[0].aval.shape

    def form(images):
        if padded:
            images = lax.optimization_barrier(lax.pad(images, jnp.asarray(start, images.dtype), [(low, high, 0) for low, high in padding]))
        return functools.reduce(
            join, (strided(images, starts, shape, strides, first=0) for starts in itertools.product(*map(range, window)))
        )

    return form


_JOINS: dict[str, tuple[Callable, float]] = {"reduce_window_max": (jnp.maximum, -math.inf), "reduce_window_sum": (jnp.add, 0.0)}
