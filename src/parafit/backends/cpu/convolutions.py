"""Convolutions, their gradients, and convolutions in groups."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from parafit.backends.cpu.products import kernel_gradient, product
from parafit.backends.cpu.windows import MOST_OFFSETS, every, strided

MOST_GROUPS = 8
"""Grouped convolutions of more groups than this are not split into ordinary ones; gradients of kernels are, up to four times as many."""

FEW_CHANNELS = 8
"""XLA:CPU's convolution is slow at images, and at results, of fewer channels than this: they do not fill its vectors."""

WASTE = 3 / 2
"""With this many times as many results as pixels, products per pixel are faster than XLA:CPU's convolution: it multiplies padding too."""

BLOCK_BYTES, MOST_BLOCKS = 2**24, 8
"""Patches of images that are gathered at a time, and how many times at most: each time makes the program longer. What products per pixel
give is held whole, and takes no more than all these patches."""


def is_kernel_gradient(equation: JaxprEqn) -> bool:
    """Whether it is a convolution over images whose batch is summed, as JAX writes the gradient of a kernel."""
    return equation.primitive.name == "conv_general_dilated" and equation.params["dimension_numbers"].lhs_spec[0] != 0


def choose_convolution(equation: JaxprEqn, *, alone: bool = True) -> Callable | None:
    """The form of a convolution that XLA:CPU runs well; None where its own is kept.

    Args:
        equation: the convolution.
        alone: whether it is an operation by itself, rather than one that may run as one with its neighbours.
    """
    params, dims = equation.params, equation.params["dimension_numbers"]
    images, kernel = (var.aval for var in equation.invars)
    inner = _convolution_form(equation, alone)
    orders = _last(dims.lhs_spec), _kernel_last(dims.rhs_spec), _last(dims.out_spec)
    plain = tuple(range(len(images.shape)))
    fast = {_convolve: plain, _convolve_small_groups: (*plain[:-2], plain[-1], plain[-2])}
    unfit = len(images.shape) < 3 or 0 in images.shape + kernel.shape or not jnp.issubdtype(images.dtype, jnp.floating)
    if unfit or inner is None or orders == (plain, fast.get(inner), plain):
        return None
    groups = params["feature_group_count"], params["batch_group_count"]
    names = "window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "preferred_element_type"
    options = {name: params[name] for name in names}

    def form(images, kernel):
        result = inner(lax.transpose(images, orders[0]), lax.transpose(kernel, orders[1]), groups, options)
        return lax.transpose(result, np.argsort(orders[2]))

    return form


def _convolution_form(equation: JaxprEqn, alone: bool) -> Callable | None:
    dims, features, batches = (equation.params[name] for name in ("dimension_numbers", "feature_group_count", "batch_group_count"))
    images, kernel, result = (var.aval.shape for var in (*equation.invars, *equation.outvars))
    few_outputs = math.prod(result[dim] for dim in dims.out_spec[2:]) <= MOST_OFFSETS
    if features > 1:
        inputs, out = kernel[dims.rhs_spec[1]], kernel[dims.rhs_spec[0]] // features
        if 1 in (inputs, out) or inputs * out <= 16:
            return _convolve_small_groups
        return _split_groups if features <= MOST_GROUPS else None
    if batches > 1:
        splits = _split_groups if batches <= 4 * MOST_GROUPS else None
        return None if not few_outputs else _depthwise_correlate if batches == images[dims.lhs_spec[0]] else splits
    if few_outputs and is_kernel_gradient(equation):
        return _correlate
    return _dense_form(equation) if alone else _convolve


def _dense_form(equation: JaxprEqn) -> Callable:
    """Of a convolution in one group. Measured on 2 cores of a Zen 4 (JAX 0.10.2)."""
    dims = equation.params["dimension_numbers"]
    images, kernel, result = (var.aval for var in (*equation.invars, *equation.outvars))
    outputs, inputs, *window = (kernel.shape[dim] for dim in dims.rhs_spec)
    pixels, results = (math.prod(array.shape) // array.shape[spec[1]] for array, spec in ((images, dims.lhs_spec), (result, dims.out_spec)))
    if math.prod(window) > MOST_OFFSETS:
        return _convolve
    most = MOST_BLOCKS * BLOCK_BYTES / math.prod(window) / images.dtype.itemsize
    if inputs < FEW_CHANNELS and inputs <= outputs:
        return _convolve_patches if results * inputs <= most else _convolve
    spread = set(equation.params["window_strides"]) == {1} and (outputs < FEW_CHANNELS or results >= WASTE * pixels)
    return _convolve_spread if spread and pixels * outputs <= most else _convolve


def _last(spec: Sequence[int]) -> tuple[int, ...]:
    """(batch, channels, *space) as (batch, *space, channels)."""
    return spec[0], *spec[2:], spec[1]


def _kernel_last(spec: Sequence[int]) -> tuple[int, ...]:
    """(out, in, *space) as (*space, in, out)."""
    return *spec[2:], spec[1], spec[0]


def _convolve(images: jax.Array, kernel: jax.Array, groups: tuple[int, int], options: dict, last: str = "IO") -> jax.Array:
    """The layout that XLA:CPU has a fast kernel for. images: (batch, *space, in), kernel: (*window, in, out)."""
    space = "XYZUVW"[: images.ndim - 2]
    layouts = f"N{space}C", space + last, f"N{space}C"
    return lax.conv_general_dilated(images, kernel, dimension_numbers=layouts, feature_group_count=groups[0], **options)


def _convolve_small_groups(images: jax.Array, kernel: jax.Array, groups: tuple[int, int], options: dict) -> jax.Array:
    """Depthwise convolutions and their like are fast only with a kernel of (*window, out, in)."""
    return _convolve(images, jnp.swapaxes(kernel, -1, -2), groups, options, last="OI")


def _convolve_patches(images: jax.Array, kernel: jax.Array, groups: tuple[int, int], options: dict) -> jax.Array:
    """Of few channels: the pixels under each window gathered as a row of a matrix, some rows of the results at a time."""
    window, strides, dilations = kernel.shape[:-2], options["window_strides"], options["rhs_dilation"]
    padded = _padded(images, options)
    sizes = [len(offsets) for offsets in _offsets(padded, window, options)]
    row_bytes = padded.dtype.itemsize * len(images) * math.prod(sizes[1:]) * math.prod(kernel.shape[:-1])
    rows = max(1, BLOCK_BYTES // row_bytes)
    parts = []
    for first in range(0, sizes[0], rows):
        some = min(rows, sizes[0] - first), *sizes[1:]
        pixels = []
        for places in itertools.product(*map(range, window)):
            top, *others = (place * dilation for place, dilation in zip(places, dilations))
            pixels.append(strided(padded, (top + first * strides[0], *others), some, strides))
        patches = lax.optimization_barrier(jnp.stack(pixels, axis=-2))
        dims = (patches.ndim - 2, patches.ndim - 1), (0, 1)
        parts.append(product(patches, kernel.reshape(-1, *kernel.shape[-2:]), dims, **_exactness(options)))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _convolve_spread(images: jax.Array, kernel: jax.Array, groups: tuple[int, int], options: dict) -> jax.Array:
    """What each pixel adds to each result as products, then summed where it belongs: padding and dilation are not multiplied."""
    window, last = kernel.shape[:-2], images.ndim - 3
    reaches = [(width - 1) * dilation for width, dilation in zip(window, options["rhs_dilation"])]
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(images.shape[1:-1], options["lhs_dilation"])]
    sizes = [span + sum(padding) - reach for span, padding, reach in zip(spans, options["padding"], reaches)]

    def placed(array, dim, place):
        """`array` where the results lie that the pixels of `dim` reach through `place` of the window."""
        dilation, low = options["lhs_dilation"][dim], options["padding"][dim][0] - place * options["rhs_dilation"][dim]
        widths = [(0, 0, 0)] * array.ndim
        widths[dim + 1] = low, sizes[dim] - low - spans[dim], dilation - 1
        return lax.pad(array, jnp.zeros((), array.dtype), widths)

    columns = product(images, kernel, ((images.ndim - 1,), (kernel.ndim - 2,)), **_exactness(options))
    total: Any = None
    for places in itertools.product(*map(range, window[:-1])):
        row = columns[(..., *places, slice(None), slice(None))]
        part = lax.optimization_barrier(sum(placed(row[..., place, :], last, place) for place in range(window[-1])))
        for dim, place in enumerate(places):
            part = placed(part, dim, place)
        total = part if total is None else total + part
    return total


def _correlate(images: jax.Array, kernel: jax.Array, groups: tuple[int, int], options: dict) -> jax.Array:
    """A kernel's gradient: out[i, y, o] = Σ over b, w of images[i, y·stride + w·dilation, b] · kernel[w, b, o], as products of matrices.

    images: (in, *space, batch), kernel: the gradient of the outputs (*window, batch, out), returns (in, *offsets, out).
    The offsets along the last dim are gathered into one matrix, those along the others are products of their own.
    """
    window, out, inputs = kernel.shape[:-2], kernel.shape[-1], images.shape[0]
    padded = _padded(jnp.swapaxes(images, 0, -1), options)
    gradient = jnp.moveaxis(kernel, -2, 0).reshape(-1, out)
    *others, last = _offsets(padded, window, options)
    dim, dilations = len(window), options["rhs_dilation"]
    gathered = jnp.concatenate([every(padded, start, window[-1], dilations[-1], dim) for start in last], axis=-1)
    products = []
    for starts in itertools.product(*others):
        patches = lax.optimization_barrier(strided(gathered, starts, window, dilations)).reshape(len(gradient), -1)
        products.append(kernel_gradient(patches, gradient, **_exactness(options)))
    result = jnp.stack(products).reshape(*map(len, others), len(last), inputs, out)
    return jnp.moveaxis(result, -2, 0)


def _depthwise_correlate(images: jax.Array, kernel: jax.Array, groups: tuple[int, int], options: dict) -> jax.Array:
    """The gradient of a depthwise kernel. images: (channels, *space, batch), kernel: (*window, batch, channels·multiplier)."""
    channels, window = images.shape[0], kernel.shape[:-2]
    padded = _padded(jnp.swapaxes(images, 0, -1), options)
    gradient = jnp.moveaxis(kernel, -2, 0).reshape(padded.shape[0], *window, channels, -1)
    gradient = gradient.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    offsets = _offsets(padded, window, options)
    sums = [
        (strided(padded, starts, window, options["rhs_dilation"])[..., None] * gradient).sum(range(len(window) + 1))
        for starts in itertools.product(*offsets)
    ]
    return jnp.stack(sums).reshape(1, *map(len, offsets), -1).astype(options["preferred_element_type"] or images.dtype)


def _split_groups(images: jax.Array, kernel: jax.Array, groups: tuple[int, int], options: dict) -> jax.Array:
    """Group after group, each an ordinary convolution."""
    count = max(groups)
    image_groups = jnp.split(images, count, axis=-1 if groups[0] > 1 else 0)
    inner = _convolve if groups[0] > 1 else _correlate
    parts = [inner(part, weights, (1, 1), options) for part, weights in zip(image_groups, jnp.split(kernel, count, axis=-1))]
    return jnp.concatenate(parts, axis=-1)


def _exactness(options: dict) -> dict:
    return {name: options[name] for name in ("precision", "preferred_element_type")}


def _padded(images: jax.Array, options: dict) -> jax.Array:
    """images (batch, *space, channels) padded and dilated as the convolution asks; a negative width cuts."""
    space = [(low, high, dilation - 1) for (low, high), dilation in zip(options["padding"], options["lhs_dilation"])]
    if not any(map(any, space)):
        return images
    return lax.optimization_barrier(lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *space, (0, 0, 0)]))


def _offsets(images: jax.Array, window: Sequence[int], options: dict) -> list[range]:
    """For each spatial dim of images (batch, *space, channels): where a window may start."""
    reaches = [(width - 1) * dilation for width, dilation in zip(window, options["rhs_dilation"])]
    return [range(0, size - reach, stride) for size, reach, stride in zip(images.shape[1:-1], reaches, options["window_strides"])]
