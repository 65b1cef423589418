"""Which probes `calibrate` times: networks, and every kind of operation that a step of training has."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parafit.calibration.probe import Probe, apart, numbers
from parafit.calibration.product_probes import IMAGES, SEQUENCES, batched, convolutions, dense_layer, matmul, usual_shapes
from parafit.planner.cost.calibrated import FAR_STACK_BYTES, NEAR_STACK_BYTES


def probes() -> Iterable[Probe]:
    """All probes, the most telling first: a calibration takes at least the networks, one layer's products and two curves."""
    yield from (*map(_network, NETWORKS), _turn(), *dense_layer(256, 256, 256))
    for exponent in (10, 14, 17, 20, 22, 24, 25, 26):
        yield from (_elementwise(2**exponent), _update(2**exponent))
    yield from (_elementwise(2**27), _elementwise(2**28))
    corners = itertools.product((16, 64, 256, 1024), (16, 64, 256, 1024), (10, 64, 256, 1024))
    for shape in corners:
        if math.prod(shape) < 2**30 and shape != (256, 256, 256):
            yield from dense_layer(*shape)
    for precision, side in itertools.product(("float64", "bfloat16"), (64, 256)):
        yield matmul(precision, side, side, side)
    for exponent in (8, 12, 16, 20, 23):
        yield from (_function("exp", lambda x: jnp.exp(x - 1), 2**exponent), _function("tanh", jnp.tanh, 2**exponent))
        yield from (_function("div", lambda x: 0.5 / (x + 0.5), 2**exponent), _arithmetic(2**exponent))
    for exponent in (10, 15, 19, 23):
        yield from (*_reductions(2**exponent), _move(2**exponent), _slice(2**exponent))
    for exponent in (16, 19, 22):
        yield _pooling(2**exponent)
    for exponent in (12, 16, 20):
        yield from (_stack(2**exponent, "stack_near", NEAR_STACK_BYTES), _stack(2**exponent, "stack", FAR_STACK_BYTES))
    for images in IMAGES:
        yield from convolutions(*images, window=(3, 3))
    for sequences in SEQUENCES:
        yield from convolutions(*sequences, window=(5,))
    for shape in ((32, 16, 32), (64, 16, 64), (64, 64, 16), (128, 16, 128), (128, 128, 32)):
        yield batched("float32", *shape)
    for exponent in (12, 17, 22):
        yield from (_random(2**exponent), _gather(2**exponent, "gather", 4 * _rows(2**exponent / 2)), _scatter(2**exponent))
        yield from (_gather(2**exponent, "gather_near", 64), _sort(2**exponent))
    for shape in usual_shapes(64):
        yield from dense_layer(*shape)


def _turn() -> Probe:
    """A turn of a loop inside a program: four small operations, each on the result of the one before."""
    return Probe(part="turn", kind="operation", size=4, body=lambda carry: _chained(carry, 4), carry=numbers(32, 64))


def _chained(x: jax.Array, length: int) -> jax.Array:
    for _ in range(length):
        x = apart(x * 0.5 + 0.1)
    return x


def _network(depth: int) -> Probe:
    """A step of training so small that nearly all of it is starting operations."""
    weights, batch = network_shapes(depth)

    def body(carry):
        weights, slots, batch = carry
        gradients = jax.grad(network_loss)(weights, batch)
        changes, slots = ADAM[1](gradients, slots, weights)
        return jax.tree.map(jnp.add, weights, changes), slots, batch

    weights, batch = jax.tree.map(lambda shape: numbers(*shape.shape) / 50, (weights, batch))
    return Probe(part="network", kind="operation", size=depth, body=body, carry=(weights, ADAM[0](weights), batch))


NETWORKS = (2, 4, 8, 16)
"""Layers of the networks that are probed."""


def network_shapes(depth: int) -> tuple[Any, Any]:
    """Shapes of a network of so many dense layers of 16 units, and of a batch of 8 rows for it."""

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    return [(shape(16, 16), shape(16))] * depth, (shape(8, 16), shape(8, 16))


def network_loss(weights: Any, batch: Any) -> jax.Array:
    """Cross-entropy of a network of dense layers with ReLU between them.

    Args:
        weights: (kernel, bias) of each layer, as `network_shapes` says.
        batch: (inputs, targets), both of (8, 16).
    """
    x, y = batch
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(x @ weights[-1][0] + weights[-1][1]), axis=1))


def _adam(gradients, slots, weights):
    mean, square = slots
    mean = jax.tree.map(lambda old, new: old + (new - old) * 0.1, mean, gradients)
    square = jax.tree.map(lambda old, new: old + (new * new - old) * 0.001, square, gradients)
    return jax.tree.map(lambda mean, square: -0.001 * mean / (jnp.sqrt(square) + 1e-7), mean, square), (mean, square)


ADAM = (lambda weights: tuple(jax.tree.map(jnp.zeros_like, weights) for _ in "mv"), _adam)
"""Adam (Kingma, Ba 2015) without the correction of bias, as a pair (init, update) as Optax has them."""


def _rows(nbytes: float) -> int:
    """Rows of 64 float32 numbers."""
    return max(1, int(nbytes) // 256)


def _elementwise(nbytes: int) -> Probe:
    """x ← a x + y: reads two arrays, writes one."""
    x = numbers(_rows(nbytes / 3), 64)
    return Probe(part="curve", kind="elementwise", size=3 * x.nbytes, body=lambda c: apart((c[0] * 0.5 + c[1], c[1])), carry=(x, x + 1))


def _update(nbytes: int) -> Probe:
    """Adam's update (Kingma, Ba 2015): two slots and the parameter, three operations of ten arrays read or written."""
    x = numbers(_rows(nbytes / 10), 64)

    def body(carry):
        gradient, mean, square, weight = carry
        mean, square = mean + (gradient - mean) * 0.1, square + (gradient * gradient - square) * 0.001
        return apart((gradient, mean, square, weight - mean * 0.001 / (jnp.sqrt(square) + 1e-7)))

    return Probe(part="curve", kind="update", size=10 * x.nbytes, body=body, carry=(x, x + 1, x + 2, x + 3))


def _function(name: str, function: Callable, nbytes: int) -> Probe:
    """A function of every element, which stays between 0 and 1."""
    x = numbers(_rows(nbytes), 64)
    return Probe(part="curve", kind=f"function {name}", size=x.nbytes, body=lambda c: (apart(function(c[0])),), carry=(x,))


def _arithmetic(nbytes: int) -> Probe:
    """Seventeen additions and multiplications of every element, in one kernel."""
    x = numbers(_rows(nbytes), 64)

    def body(carry):
        (result,) = carry
        for _ in range(8):
            result = result * carry[0] + 0.2
        return (apart(result * 0.3),)

    return Probe(part="curve", kind="arithmetic", size=17 * x.nbytes, body=body, carry=(x,))


def _reductions(nbytes: int) -> Iterable[Probe]:
    """Sums over rows and over columns; the first result goes back into the array, so that no run can be left out."""
    x = numbers(_rows(nbytes), 64)
    for axis in (0, 1):

        def body(carry, axis=axis):
            total = apart(carry[0].sum(axis))
            return apart((lax.dynamic_update_slice(carry[0], total[:1, None] * 0.0, (0, 0)),))

        yield Probe(part="curve", kind=f"reduction {axis}", size=x.nbytes, body=body, carry=(x,))


def _move(nbytes: int) -> Probe:
    """A copy with two dims exchanged, as attention has its heads: (sequences, tokens, heads, 16)."""
    x = numbers(max(1, int(nbytes) // 32768), 64, 4, 16)

    def body(carry):
        for _ in range(2):
            carry = apart(carry.transpose(0, 2, 1, 3))
        return carry

    return Probe(part="curve", kind="move", size=2 * x.nbytes, body=body, carry=x, runs=2)


def _slice(nbytes: int) -> Probe:
    """One batch of a block of eight."""
    x = numbers(8, _rows(nbytes / 2), 64)

    def body(carry):
        block, index, _ = carry
        return apart((block, (index + 1) % 8, apart(lax.dynamic_index_in_dim(block, index, keepdims=False))))

    return Probe(part="curve", kind="slice", size=2 * x[0].nbytes, body=body, carry=(x, np.int32(0), x[0]))


def _pooling(nbytes: int) -> Probe:
    """The larger of every 2 × 2 numbers of images, and the gradient."""
    images = np.random.default_rng(0).random((nbytes // 2**15, 16, 16, 32), np.float32)
    windows = (1, 2, 2, 1), (1, 2, 2, 1), "VALID"

    def body(images):
        pooled, gradients = jax.vjp(lambda images: lax.reduce_window(images, -jnp.inf, lax.max, *windows), images)
        return apart(images + gradients(apart(pooled * 1e-3))[0])

    return Probe(part="curve", kind="pooling", size=1.75 * images.nbytes, body=body, carry=images, runs=2)


def _stack(nbytes: int, kind: str, whole: int) -> Probe:
    """What a step of a loop adds to an array of so many bytes that holds something of all steps."""
    x = numbers(_rows(nbytes / 2), 64)
    stack = numbers(whole // x.nbytes, *x.shape)

    def body(carry):
        stack, index, x = carry
        return apart((lax.dynamic_update_index_in_dim(stack, x, index, 0), (index + 1) % len(stack), x))

    return Probe(part="curve", kind=kind, size=2 * x.nbytes, body=body, carry=(stack, np.int32(0), x))


def _random(nbytes: int) -> Probe:
    rows = _rows(nbytes)

    def body(carry):
        key, _ = carry
        key = jax.random.fold_in(key, 1)
        return apart((key, jax.random.bits(key, (rows, 64))))

    return Probe(part="curve", kind="random", size=rows * 256, body=body, carry=(jax.random.key(0), np.zeros((rows, 64), np.uint32)))


def _places(rows: int, of: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, of, rows, dtype=np.int32)


def _gather(nbytes: int, kind: str, of: int) -> Probe:
    """Rows of 64 numbers, taken from so many."""
    rows = _rows(nbytes / 2)

    def body(carry):
        table, places, taken = carry
        taken = apart(jnp.take(table, places, axis=0, mode="clip"))
        return apart((table, places + taken[0, 0].astype(jnp.int32), taken))

    carry = (np.zeros((of, 64), np.float32), _places(rows, of), numbers(rows, 64))
    return Probe(part="curve", kind=kind, size=2 * rows * 256 + 4 * rows, body=body, carry=carry)


def _scatter(nbytes: int) -> Probe:
    """Rows of 64 numbers, added to rows of four times as many."""
    rows = _rows(nbytes / 3)

    def body(carry):
        table, places, given = carry
        return apart((table.at[places].add(given), places, given))

    carry = (np.zeros((4 * rows, 64), np.float32), _places(rows, 4 * rows), numbers(rows, 64))
    return Probe(part="curve", kind="scatter", size=3 * rows * 256 + 4 * rows, body=body, carry=carry)


def _sort(nbytes: int) -> Probe:
    x = np.random.default_rng(0).random((_rows(nbytes / 2), 64), np.float32)
    return Probe(part="curve", kind="sort", size=2 * x.nbytes, body=lambda c: apart((lax.sort(c[0] * -1.0),)), carry=(x,))
