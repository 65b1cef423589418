"""Probes: what `calibrate` times. Each is one kind of operation in a compiled loop, as parafit runs steps, after the same rewriting."""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parafit import backends
from parafit.planner.cost.calibrated import FAR_STACK_BYTES, NEAR_STACK_BYTES
from parafit.tracing.passes import traced_through

_BURST_SECONDS = 4e-3


@dataclass(eq=False, kw_only=True)
class Probe:
    """Something to time.

    Attributes:
        part: which number it is for: "curve", "matmul", "network" or "turn".
        kind: of operation, or precision.
        size: bytes of one run, a matmul's (rows, inner, columns), or a network's layers.
        body: one turn of the loop: carry to carry.
        carry: what the loop starts with.
        runs: operations in one turn.
        samples: seconds of one run, each over a few milliseconds.
        turns: of the loop, the next time.
        called: whether a run is a call of a library, so that the quicker of XLA's emitters may compile what is around it.
    """

    part: str
    kind: str
    size: Any
    body: Callable
    carry: Any
    runs: int = 1
    turns: int = 1
    called: bool = False
    samples: list[float] = field(default_factory=list)
    _loop: Any = field(default=None)

    @property
    def seconds(self) -> float:
        """Of one run: the median, which is what training meets; the fastest moments of a busy machine do not last.

        Of calls of a library the lower quartile: its threads, awoken after others worked, at first share a core in many a short burst.
        """
        return float(np.quantile(self.samples, 0.25 if self.called else 0.5)) if self.samples else math.inf

    @property
    def rate(self) -> float:
        """FLOP/s of a product."""
        return 2 * math.prod(self.size) / self.seconds

    def compile(self) -> None:
        """Make the loop."""
        backend = backends.current()  # as steps are compiled
        options = backend.compiler_options(jax.make_jaxpr(self.body)(self.carry), seldom=self.called)
        body = traced_through(backend.rewrite, self.body)

        def loop(carry, count):
            return lax.fori_loop(0, count, lambda _, carry: body(carry), carry)

        with jax.enable_x64(self.kind == "float64"):  # whatever this process computes in
            self.carry = jax.device_put(self.carry)
            self._loop = backend.compile(jax.jit(loop, donate_argnums=0).lower(self.carry, np.int32(1)), options)

    def time(self) -> None:
        """Run the loop for a few milliseconds, once one turn has brought its arrays as near as a step of training finds them."""
        self.carry = jax.block_until_ready(self._loop(self.carry, np.int32(1)))
        started = time.perf_counter()
        self.carry = jax.block_until_ready(self._loop(self.carry, np.int32(self.turns)))
        taken = time.perf_counter() - started
        if self.turns > 1 or taken > _BURST_SECONDS / 2:
            self.samples.append(taken / self.turns / self.runs)
        if taken < _BURST_SECONDS / 2:
            self.turns = math.ceil(self.turns * min(100.0, _BURST_SECONDS / taken))


def probes() -> Iterable[Probe]:
    """All probes, the most telling first: a calibration takes at least the networks, one layer's products and two curves."""
    yield from (*map(_network, NETWORKS), _turn(), *_layer(256, 256, 256))
    for exponent in (10, 14, 17, 20, 22, 24, 25, 26):
        yield from (_elementwise(2**exponent), _update(2**exponent))
    yield from (_elementwise(2**27), _elementwise(2**28))
    corners = itertools.product((16, 64, 256, 1024), (16, 64, 256, 1024), (10, 64, 256, 1024))
    for shape in corners:
        if math.prod(shape) < 2**30 and shape != (256, 256, 256):
            yield from _layer(*shape)
    for precision, side in itertools.product(("float64", "bfloat16"), (64, 256)):
        yield _matmul(precision, side, side, side)
    for exponent in (8, 12, 16, 20, 23):
        yield from (_function("exp", lambda x: jnp.exp(x - 1), 2**exponent), _function("tanh", jnp.tanh, 2**exponent))
        yield from (_function("div", lambda x: 0.5 / (x + 0.5), 2**exponent), _arithmetic(2**exponent))
    for exponent in (10, 15, 19, 23):
        yield from (*_reductions(2**exponent), _move(2**exponent), _slice(2**exponent))
    for exponent in (16, 19, 22):
        yield _pooling(2**exponent)
    for exponent in (12, 16, 20):
        yield from (_stack(2**exponent, "stack_near", NEAR_STACK_BYTES), _stack(2**exponent, "stack", FAR_STACK_BYTES))
    for images in _IMAGES:
        yield from _convolutions(*images, window=(3, 3))
    for sequences in _SEQUENCES:
        yield from _convolutions(*sequences, window=(5,))
    for shape in ((32, 16, 32), (64, 16, 64), (64, 64, 16), (128, 16, 128), (128, 128, 32)):
        yield _batched("float32", *shape)
    for exponent in (12, 17, 22):
        yield from (_random(2**exponent), _gather(2**exponent, "gather", 4 * _rows(2**exponent / 2)), _scatter(2**exponent))
        yield from (_gather(2**exponent, "gather_near", 64), _sort(2**exponent))
    for shape in _usual_shapes(64):
        yield from _layer(*shape)


def _numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.full(shape, 0.5, jnp.dtype(dtype))


def _turn() -> Probe:
    """A turn of a loop inside a program: four small operations, each on the result of the one before."""
    return Probe(part="turn", kind="operation", size=4, body=lambda carry: _chained(carry, 4), carry=_numbers(32, 64))


def _chained(x: jax.Array, length: int) -> jax.Array:
    for _ in range(length):
        x = _apart(x * 0.5 + 0.1)
    return x


def _network(depth: int) -> Probe:
    """A step of training so small that nearly all of it is starting operations."""
    weights, batch = network_shapes(depth)

    def body(carry):
        weights, slots, batch = carry
        gradients = jax.grad(network_loss)(weights, batch)
        changes, slots = ADAM[1](gradients, slots, weights)
        return jax.tree.map(jnp.add, weights, changes), slots, batch

    weights, batch = jax.tree.map(lambda shape: _numbers(*shape.shape) / 50, (weights, batch))
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
        weights: a pair (kernel of shape (inputs, outputs), bias of shape (outputs,)) for each layer.
        batch: (x, y): inputs of shape (rows, inputs), and the classes' probabilities of shape (rows, classes).
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


_apart = lax.optimization_barrier


def _elementwise(nbytes: int) -> Probe:
    """x ← a x + y: reads two arrays, writes one."""
    x = _numbers(_rows(nbytes / 3), 64)
    return Probe(part="curve", kind="elementwise", size=3 * x.nbytes, body=lambda c: _apart((c[0] * 0.5 + c[1], c[1])), carry=(x, x + 1))


def _update(nbytes: int) -> Probe:
    """Adam's update (Kingma, Ba 2015): two slots and the parameter, three operations of ten arrays read or written."""
    x = _numbers(_rows(nbytes / 10), 64)

    def body(carry):
        gradient, mean, square, weight = carry
        mean, square = mean + (gradient - mean) * 0.1, square + (gradient * gradient - square) * 0.001
        return _apart((gradient, mean, square, weight - mean * 0.001 / (jnp.sqrt(square) + 1e-7)))

    return Probe(part="curve", kind="update", size=10 * x.nbytes, body=body, carry=(x, x + 1, x + 2, x + 3))


def _function(name: str, function: Callable, nbytes: int) -> Probe:
    """A function of every element, which stays between 0 and 1."""
    x = _numbers(_rows(nbytes), 64)
    return Probe(part="curve", kind=f"function {name}", size=x.nbytes, body=lambda c: (_apart(function(c[0])),), carry=(x,))


def _arithmetic(nbytes: int) -> Probe:
    """Seventeen additions and multiplications of every element, in one kernel."""
    x = _numbers(_rows(nbytes), 64)

    def body(carry):
        (result,) = carry
        for _ in range(8):
            result = result * carry[0] + 0.2
        return (_apart(result * 0.3),)

    return Probe(part="curve", kind="arithmetic", size=17 * x.nbytes, body=body, carry=(x,))


def _reductions(nbytes: int) -> Iterable[Probe]:
    """Sums over rows and over columns; the first result goes back into the array, so that no run can be left out."""
    x = _numbers(_rows(nbytes), 64)
    for axis in (0, 1):

        def body(carry, axis=axis):
            total = _apart(carry[0].sum(axis))
            return _apart((lax.dynamic_update_slice(carry[0], total[:1, None] * 0.0, (0, 0)),))

        yield Probe(part="curve", kind=f"reduction {axis}", size=x.nbytes, body=body, carry=(x,))


def _move(nbytes: int) -> Probe:
    """A copy with two dims exchanged, as attention has its heads: (sequences, tokens, heads, 16)."""
    x = _numbers(max(1, int(nbytes) // 32768), 64, 4, 16)

    def body(carry):
        for _ in range(2):
            carry = _apart(carry.transpose(0, 2, 1, 3))
        return carry

    return Probe(part="curve", kind="move", size=2 * x.nbytes, body=body, carry=x, runs=2)


def _slice(nbytes: int) -> Probe:
    """One batch of a block of eight."""
    x = _numbers(8, _rows(nbytes / 2), 64)

    def body(carry):
        block, index, _ = carry
        return _apart((block, (index + 1) % 8, _apart(lax.dynamic_index_in_dim(block, index, keepdims=False))))

    return Probe(part="curve", kind="slice", size=2 * x[0].nbytes, body=body, carry=(x, np.int32(0), x[0]))


def _pooling(nbytes: int) -> Probe:
    """The larger of every 2 × 2 numbers of images, and the gradient."""
    images = np.random.default_rng(0).random((nbytes // 2**15, 16, 16, 32), np.float32)
    windows = (1, 2, 2, 1), (1, 2, 2, 1), "VALID"

    def body(images):
        pooled, gradients = jax.vjp(lambda images: lax.reduce_window(images, -jnp.inf, lax.max, *windows), images)
        return _apart(images + gradients(_apart(pooled * 1e-3))[0])

    return Probe(part="curve", kind="pooling", size=1.75 * images.nbytes, body=body, carry=images, runs=2)


def _stack(nbytes: int, kind: str, whole: int) -> Probe:
    """What a step of a loop adds to an array of so many bytes that holds something of all steps."""
    x = _numbers(_rows(nbytes / 2), 64)
    stack = _numbers(whole // x.nbytes, *x.shape)

    def body(carry):
        stack, index, x = carry
        return _apart((lax.dynamic_update_index_in_dim(stack, x, index, 0), (index + 1) % len(stack), x))

    return Probe(part="curve", kind=kind, size=2 * x.nbytes, body=body, carry=(stack, np.int32(0), x))


def _random(nbytes: int) -> Probe:
    rows = _rows(nbytes)

    def body(carry):
        key, _ = carry
        key = jax.random.fold_in(key, 1)
        return _apart((key, jax.random.bits(key, (rows, 64))))

    return Probe(part="curve", kind="random", size=rows * 256, body=body, carry=(jax.random.key(0), np.zeros((rows, 64), np.uint32)))


def _places(rows: int, of: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, of, rows, dtype=np.int32)


def _gather(nbytes: int, kind: str, of: int) -> Probe:
    """Rows of 64 numbers, taken from so many."""
    rows = _rows(nbytes / 2)

    def body(carry):
        table, places, taken = carry
        taken = _apart(jnp.take(table, places, axis=0, mode="clip"))
        return _apart((table, places + taken[0, 0].astype(jnp.int32), taken))

    carry = (np.zeros((of, 64), np.float32), _places(rows, of), _numbers(rows, 64))
    return Probe(part="curve", kind=kind, size=2 * rows * 256 + 4 * rows, body=body, carry=carry)


def _scatter(nbytes: int) -> Probe:
    """Rows of 64 numbers, added to rows of four times as many."""
    rows = _rows(nbytes / 3)

    def body(carry):
        table, places, given = carry
        return _apart((table.at[places].add(given), places, given))

    carry = (np.zeros((4 * rows, 64), np.float32), _places(rows, 4 * rows), _numbers(rows, 64))
    return Probe(part="curve", kind="scatter", size=3 * rows * 256 + 4 * rows, body=body, carry=carry)


def _sort(nbytes: int) -> Probe:
    x = np.random.default_rng(0).random((_rows(nbytes / 2), 64), np.float32)
    return Probe(part="curve", kind="sort", size=2 * x.nbytes, body=lambda c: _apart((lax.sort(c[0] * -1.0),)), carry=(x,))


def _matmul(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """A dense layer's product; the next one reads it."""

    def body(carry):
        left, kernel, _ = carry
        result = _apart(left @ kernel)
        return _apart((_nudged(left, result), kernel, result))

    carry = _dense(precision, rows, inner, columns)
    return Probe(part="matmul", kind=precision, size=(rows, inner, columns), body=body, carry=carry, called=True)


def _input_gradient(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """The gradient of a dense layer's input, the product (rows, columns, inner) with its kernel transposed; the next one reads it."""

    def body(carry):
        left, kernel, result = carry
        left = _apart(jax.vjp(lambda left: left @ kernel, left)[1](result)[0])
        return _apart((left, kernel, _nudged(result, left)))

    carry = _dense(precision, rows, inner, columns)
    return Probe(part="matmul", kind=f"{precision} transposed", size=(rows, columns, inner), body=body, carry=carry, called=True)


def _kernel_gradient(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """The gradient of a dense layer's kernel, by the product (columns, rows, inner) that JAX makes of it; the next one reads it."""

    def body(carry):
        left, kernel, result = carry
        kernel = _apart(jax.vjp(lambda kernel: left @ kernel, kernel)[1](result)[0])
        return _apart((_nudged(left, kernel), kernel, result))

    carry = _dense(precision, rows, inner, columns)
    return Probe(part="matmul", kind=f"{precision} gradient", size=(columns, rows, inner), body=body, carry=carry, called=True)


def _layer(rows: int, inner: int, columns: int) -> Iterable[Probe]:
    """All products of a dense layer in float32."""
    return tuple(product("float32", rows, inner, columns) for product in (_matmul, _input_gradient, _kernel_gradient))


def _usual_shapes(count: int) -> Iterable[tuple[int, int, int]]:
    """Rows, inputs and units of layers, drawn by lot, always the same."""
    lot = random.Random(0)
    for _ in range(count):
        yield lot.choice(_BATCHES), lot.choice(_WIDTHS), lot.choice(_WIDTHS)


_BATCHES = (16, 32, 50, 100, 128, 200, 512, 800, 1000, 2048)
_WIDTHS = (8, 10, 20, 32, 50, 100, 128, 200, 300, 400, 512, 784, 1000, 2048)
"""Usual sizes, beside the powers of four: also such that vector registers and cache lines do not divide."""


def _dense(precision: str, rows: int, inner: int, columns: int) -> tuple[np.ndarray, ...]:
    """A dense layer's input, kernel and result."""
    return tuple(np.zeros(shape, jnp.dtype(precision)) for shape in ((rows, inner), (inner, columns), (rows, columns)))


def _nudged(array: jax.Array, by: jax.Array) -> jax.Array:
    """The array, its first number made to depend on `by`, so that `by` must be computed; in place, as nothing of the array is read."""
    return lax.dynamic_update_slice(array, by[(slice(1),) * array.ndim] * 0.0, (0,) * array.ndim)


def _batched(precision: str, rows: int, inner: int, columns: int) -> Probe:
    """Sixty-four small products at once, as the heads of attention have them."""
    count = 64

    def body(carry):
        left, right, result = carry
        result = _apart(jnp.einsum("bij,bkj->bik", left, right))
        return _apart((lax.dynamic_update_slice(left, result[:1, :1, :1], (0, 0, 0)), right, result))

    carry = _numbers(count, rows, inner), _numbers(count, columns, inner), _numbers(count, rows, columns)
    return Probe(part="matmul", kind=f"{precision} batched", size=(rows, inner, columns), body=body, carry=carry, runs=count)


_IMAGES = (
    *((32, 16, 1, 32), (16, 32, 3, 8), (32, 16, 8, 16), (32, 16, 16, 32), (128, 16, 32, 32), (32, 8, 64, 64), (128, 32, 3, 16)),
    *((48, 40, 1, 16), (64, 40, 3, 8), (24, 24, 4, 64), (48, 24, 12, 12), (96, 12, 24, 48), (16, 12, 48, 96)),
)
_SEQUENCES = ((32, 64, 8, 32), (32, 64, 64, 64), (128, 48, 24, 48), (64, 128, 48, 96))
"""Batches of images (number, side, channels, filters) and of sequences (number, length, channels, filters) to convolve."""


def _convolutions(count: int, side: int, channels: int, filters: int, window: tuple[int, ...]) -> Iterable[Probe]:
    """A convolution and its two gradients, by the products of matrices that they stand for."""
    places = (side,) * len(window)
    images, kernel, result = _numbers(count, *places, channels), _numbers(*window, channels, filters), _numbers(count, *places, filters)
    dims = ("NHWC", "HWIO", "NHWC") if len(window) == 2 else ("NHC", "HIO", "NHC")

    def convolve(images, kernel):
        return lax.conv_general_dilated(images, kernel, (1,) * len(window), "SAME", dimension_numbers=dims)

    def forward(carry):
        images, kernel, _ = carry
        result = _apart(convolve(images, kernel))
        return _apart((_nudged(images, result), kernel, result))

    def image_gradient(carry):
        images, kernel, result = carry
        images = _apart(jax.vjp(lambda images: convolve(images, kernel), images)[1](result)[0])
        return _apart((images, kernel, _nudged(result, images)))

    def kernel_gradient(carry):
        images, kernel, result = carry
        kernel = _apart(jax.vjp(lambda kernel: convolve(images, kernel), kernel)[1](result)[0])
        return _apart((images, kernel, _nudged(result, kernel)))

    spots, taps = count * side ** len(window), math.prod(window)
    shapes = (spots, taps * channels, filters), (spots, taps * filters, channels), (taps * channels, spots, filters)
    for body, shape, kind in zip((forward, image_gradient, kernel_gradient), shapes, ("convolution", "convolution", "correlation")):
        yield Probe(part="matmul", kind=f"float32 {kind}", size=shape, body=body, carry=(images, kernel, result))
