"""Probes of products of matrices: dense layers, heads of attention and convolutions, each with its gradients.

Args:
    precision: dtype of the operands.
    rows, inner, columns: sizes of the product.
    count: number of images or sequences.
    side: length of each of their dimensions.
    channels: channels of an input.
    filters: channels of a result.
    window: sizes of the kernel's window.
"""

import math
import random
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parafit.calibration.probe import Probe, apart, numbers


def dense_layer(rows: int, inner: int, columns: int) -> Iterable[Probe]:
    """All products of a dense layer in float32.

    Args:
        rows: of the batch.
        inner: inputs of the layer.
        columns: its units.
    """
    return tuple(product("float32", rows, inner, columns) for product in (matmul, _input_gradient, _kernel_gradient))


def matmul(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """A dense layer's product; the next one reads it.

    Args:
        precision: "float32", "float64" or "bfloat16".
        rows, inner, columns: as in `dense_layer`.
    """

    def body(carry):
        left, kernel, _ = carry
        result = apart(left @ kernel)
        return apart((_nudged(left, result), kernel, result))

    carry = _dense(precision, rows, inner, columns)
    return Probe(part="matmul", kind=precision, size=(rows, inner, columns), body=body, carry=carry, called=True)


def _input_gradient(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """The gradient of a dense layer's input, the product (rows, columns, inner) with its kernel transposed; the next one reads it."""

    def body(carry):
        left, kernel, result = carry
        left = apart(jax.vjp(lambda left: left @ kernel, left)[1](result)[0])
        return apart((left, kernel, _nudged(result, left)))

    carry = _dense(precision, rows, inner, columns)
    return Probe(part="matmul", kind=f"{precision} transposed", size=(rows, columns, inner), body=body, carry=carry, called=True)


def _kernel_gradient(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """The gradient of a dense layer's kernel, by the product (columns, rows, inner) that JAX makes of it; the next one reads it."""

    def body(carry):
        left, kernel, result = carry
        kernel = apart(jax.vjp(lambda kernel: left @ kernel, kernel)[1](result)[0])
        return apart((_nudged(left, kernel), kernel, result))

    carry = _dense(precision, rows, inner, columns)
    return Probe(part="matmul", kind=f"{precision} gradient", size=(columns, rows, inner), body=body, carry=carry, called=True)


def _dense(precision: str, rows: int, inner: int, columns: int) -> tuple[np.ndarray, ...]:
    """A dense layer's input, kernel and result."""
    return tuple(np.zeros(shape, jnp.dtype(precision)) for shape in ((rows, inner), (inner, columns), (rows, columns)))


def _nudged(array: jax.Array, by: jax.Array) -> jax.Array:
    """The array, its first number made to depend on `by`, so that `by` must be computed; in place, as nothing of the array is read."""
    return lax.dynamic_update_slice(array, by[(slice(1),) * array.ndim] * 0.0, (0,) * array.ndim)


def usual_shapes(count: int) -> Iterable[tuple[int, int, int]]:
    """Rows, inputs and units of layers, drawn by lot, always the same."""
    lot = random.Random(0)
    for _ in range(count):
        yield lot.choice(_BATCHES), lot.choice(_WIDTHS), lot.choice(_WIDTHS)


_BATCHES = (16, 32, 50, 100, 128, 200, 512, 800, 1000, 2048)
_WIDTHS = (8, 10, 20, 32, 50, 100, 128, 200, 300, 400, 512, 784, 1000, 2048)
"""Usual sizes, beside the powers of four: also such that vector registers and cache lines do not divide."""


def batched(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """Sixty-four small products at once, as the heads of attention have them.

    Args:
        precision: as in `matmul`.
        rows, inner, columns: of each product.
    """
    count = 64

    def body(carry):
        left, right, result = carry
        result = apart(jnp.einsum("bij,bkj->bik", left, right))
        return apart((lax.dynamic_update_slice(left, result[:1, :1, :1], (0, 0, 0)), right, result))

    carry = numbers(count, rows, inner), numbers(count, columns, inner), numbers(count, rows, columns)
    return Probe(part="matmul", kind=f"{precision} batched", size=(rows, inner, columns), body=body, carry=carry, runs=count)


IMAGES = (
    *((32, 16, 1, 32), (16, 32, 3, 8), (32, 16, 8, 16), (32, 16, 16, 32), (128, 16, 32, 32), (32, 8, 64, 64), (128, 32, 3, 16)),
    *((48, 40, 1, 16), (64, 40, 3, 8), (24, 24, 4, 64), (48, 24, 12, 12), (96, 12, 24, 48), (16, 12, 48, 96)),
)
SEQUENCES = ((32, 64, 8, 32), (32, 64, 64, 64), (128, 48, 24, 48), (64, 128, 48, 96))
"""Batches of images (number, side, channels, filters) and of sequences (number, length, channels, filters) to convolve."""


def convolutions(count: int, side: int, channels: int, filters: int, window: tuple[int, ...]) -> Iterable[Probe]:
    """A convolution and its two gradients, by the products of matrices that they stand for.

    Args:
        count: images or sequences in a batch.
        side: elements along each of their dimensions.
        channels: that come in.
        filters: that go out.
        window: sizes of the kernel: two for images, one for sequences.
    """
    places = (side,) * len(window)
    images, kernel, result = numbers(count, *places, channels), numbers(*window, channels, filters), numbers(count, *places, filters)
    dims = ("NHWC", "HWIO", "NHWC") if len(window) == 2 else ("NHC", "HIO", "NHC")

    def convolve(images, kernel):
        return lax.conv_general_dilated(images, kernel, (1,) * len(window), "SAME", dimension_numbers=dims)

    def forward(carry):
        images, kernel, _ = carry
        result = apart(convolve(images, kernel))
        return apart((_nudged(images, result), kernel, result))

    def image_gradient(carry):
        images, kernel, result = carry
        images = apart(jax.vjp(lambda images: convolve(images, kernel), images)[1](result)[0])
        return apart((images, kernel, _nudged(result, images)))

    def kernel_gradient(carry):
        images, kernel, result = carry
        kernel = apart(jax.vjp(lambda kernel: convolve(images, kernel), kernel)[1](result)[0])
        return apart((images, kernel, _nudged(result, kernel)))

    spots, taps = count * side ** len(window), math.prod(window)
    shapes = (spots, taps * channels, filters), (spots, taps * filters, channels), (taps * channels, spots, filters)
    for body, shape, kind in zip((forward, image_gradient, kernel_gradient), shapes, ("convolution", "convolution", "correlation")):
        yield Probe(part="matmul", kind=f"float32 {kind}", size=shape, body=body, carry=(images, kernel, result))
