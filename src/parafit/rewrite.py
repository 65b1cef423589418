"""Puts the operations that XLA:CPU runs badly, above all inside loops, into forms that it runs well.

A chunk of training steps is one loop, and XLA:CPU's own clean-up of convolutions visits a program's outermost computation only. Other
operations are slow everywhere: kernel gradients of dense layers over more than two dimensions, pooling and its gradients, depthwise
and grouped convolutions, random bits, `top_k` of few candidates, bfloat16 products. Thresholds are measured (JAX 0.10.2, Zen 5, 2 cores).
This pass exchanges each such equation of a traced step for one equation that calls a function of plain, fast operations. Every other
equation is kept as the very object it was, with its names, effects and sharding constraints.

The values are those of the original to the rounding of its dtype; random bits, `top_k` and pooling of finite numbers are identical.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

MOST_OFFSETS = 64
"""Windows of more positions than this are left alone: the forms below grow with each position."""
MOST_TOP_PASSES = 128
"""`top_k` is left alone if k times the number of candidates is more than this: the form below takes two passes for each value."""
MOST_GROUPS = 8
"""Grouped convolutions of more groups than this are not split into ordinary ones; gradients of kernels are, up to four times as many."""


def rewrite(step: Callable) -> Callable:
    """`step` with its slow operations exchanged: same arguments, same values.

    Args:
        step: a function of pytrees of arrays, returning a pytree of arrays.

    Returns:
        A function that traces `step`, rewrites the trace and evaluates it. Call it under `jax.jit`, which traces it once.

    >>> import jax, jax.numpy as jnp
    >>> best = rewrite(lambda x: {"best": jax.lax.top_k(x, 2)[1]})
    >>> best(jnp.array([3.0, 1.0, 4.0, 4.0]))["best"].tolist()
    [2, 3]
    """

    def rewritten(*args):
        closed, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
        outputs = jaxpr_as_fun(rewrite_jaxpr(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def rewrite_jaxpr(closed: ClosedJaxpr) -> ClosedJaxpr:
    """`closed` with its slow operations exchanged, at every depth; `closed` itself if it has none.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x: x + 1)(1.0)
    >>> rewrite_jaxpr(closed) is closed
    True
    """
    return _Rewriter().closed(closed)


class _Rewriter:
    """One pass; equal equations share one replacement, so that the lowered program holds it once."""

    def __init__(self):
        self.rewritten: dict[int, tuple[Jaxpr, Jaxpr]] = {}
        self.replacements: dict[Any, JaxprEqn] = {}

    def closed(self, closed: ClosedJaxpr) -> ClosedJaxpr:
        jaxpr = self.jaxpr(closed.jaxpr)
        return closed if jaxpr is closed.jaxpr else ClosedJaxpr(jaxpr, closed.consts)

    def jaxpr(self, jaxpr: Jaxpr) -> Jaxpr:
        if id(jaxpr) not in self.rewritten:
            equations = [self.equation(equation) for equation in jaxpr.eqns]
            changed = any(new is not old for new, old in zip(equations, jaxpr.eqns))
            self.rewritten[id(jaxpr)] = jaxpr, jaxpr.replace(eqns=equations) if changed else jaxpr
        return self.rewritten[id(jaxpr)][1]

    def equation(self, equation: JaxprEqn) -> JaxprEqn:
        choose = _CHOOSERS.get(equation.primitive.name)
        form = choose(equation) if choose else None
        return self.exchanged(equation, form) if form else self.inside(equation)

    def inside(self, equation: JaxprEqn) -> JaxprEqn:
        params = {name: self.param(value) for name, value in equation.params.items()}
        changed = any(params[name] is not value for name, value in equation.params.items())
        return equation.replace(params=params) if changed else equation

    def param(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return self.closed(value)
        if isinstance(value, Jaxpr):
            return self.jaxpr(value)
        if isinstance(value, tuple) and any(isinstance(item, ClosedJaxpr) for item in value):
            items = tuple(self.param(item) for item in value)
            return items if any(new is not old for new, old in zip(items, value)) else value
        return value

    def exchanged(self, equation: JaxprEqn, form: Callable) -> JaxprEqn:
        key = equation.primitive, tuple((var.aval.shape, var.aval.dtype) for var in equation.invars), tuple(equation.params.items())
        if key not in self.replacements:
            self.replacements[key] = _call(equation, form)
        call = self.replacements[key]
        return call.replace(
            invars=list(equation.invars), outvars=list(equation.outvars), source_info=equation.source_info, ctx=equation.ctx
        )


def _call(equation: JaxprEqn, form: Callable) -> JaxprEqn:
    """One equation that calls `form` on operands like those of `equation`."""
    form.__name__ = f"fast_{equation.primitive.name.replace('-', '_')}"
    with equation.ctx.manager:  # undocumented (JAX 0.10.2): the mesh and the flags that the equation was traced under
        traced = jax.make_jaxpr(jax.jit(form))(*(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars))
    (call,) = traced.eqns
    assert not traced.consts
    assert list(call.invars) == list(traced.jaxpr.invars)
    assert [(var.aval.shape, var.aval.dtype) for var in call.outvars] == [(var.aval.shape, var.aval.dtype) for var in equation.outvars]
    return call


# Products of matrices -----------------------------------------------------------------------------------------------------------------


def _choose_dot(equation: JaxprEqn) -> Callable | None:
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
        product = _kernel_gradient(left.reshape(terms, rows), right.reshape(terms, columns), **options)
        return product.reshape(left.shape[leading:] + right.shape[leading:])

    return form


def _kernel_gradient(left: jax.Array, right: jax.Array, **options) -> jax.Array:
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


# Convolutions -------------------------------------------------------------------------------------------------------------------------


def _choose_convolution(equation: JaxprEqn) -> Callable | None:
    params, dims = equation.params, equation.params["dimension_numbers"]
    images, kernel = (var.aval for var in equation.invars)
    inner = _convolution_form(equation)
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


def _convolution_form(equation: JaxprEqn) -> Callable | None:
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
    return _correlate if few_outputs and dims.lhs_spec[0] != 0 else _convolve


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
    gathered = jnp.concatenate([_every(padded, start, window[-1], dilations[-1], dim) for start in last], axis=-1)
    products = []
    for starts in itertools.product(*others):
        patches = lax.optimization_barrier(_strided(gathered, starts, window, dilations)).reshape(len(gradient), -1)
        products.append(_kernel_gradient(patches, gradient, **{name: options[name] for name in ("precision", "preferred_element_type")}))
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
        (_strided(padded, starts, window, options["rhs_dilation"])[..., None] * gradient).sum(range(len(window) + 1))
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


def _strided(array: jax.Array, starts: Sequence[int], sizes: Sequence[int], strides: Sequence[int], first: int = 1) -> jax.Array:
    """From `starts` on every `strides`-th entry, `sizes` of them, of the dims from `first` on."""
    for dim, (start, size, stride) in enumerate(zip(starts, sizes, strides), first):
        array = _every(array, start, size, stride, dim)
    return array


def _every(array: jax.Array, start: int, size: int, stride: int, dim: int) -> jax.Array:
    return lax.slice_in_dim(array, start, start + (size - 1) * stride + 1, stride, dim)


# Pooling ------------------------------------------------------------------------------------------------------------------------------


def _choose_pool_gradient(equation: JaxprEqn) -> Callable | None:
    params = equation.params
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    if params["select_prim"].name != "ge" or math.prod(window) > MOST_OFFSETS:
        return None
    tiled = tuple(window) == tuple(strides) and not any(map(any, padding))

    def form(gradient, images):
        gradient = gradient.astype(images.dtype)
        chosen = _chosen(images, gradient.shape, window, strides, padding)
        spread = _spread_tiled if tiled else _spread
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
        candidate = _strided(padded, starts, shape, strides, first=0)
        keep = jnp.zeros(shape, bool) if value is None else (chosen >= 0) & (value >= candidate)
        if inside is not None:
            keep = keep | ~_strided(inside, starts, shape, strides, first=0)
        value = candidate if value is None else jnp.where(keep, value, candidate)
        chosen = jnp.where(keep, chosen, number)
    return chosen


def _spread_tiled(gradient, chosen, shape, window, strides, padding):
    """Windows that tile the images: each position asks whether it was chosen."""
    split = [length for count, width in zip(gradient.shape, window) for length in (count, width)]
    blocks = [length for count in gradient.shape for length in (count, 1)]
    number: Any = 0
    for dim, width in enumerate(window):
        number = number * width + lax.broadcasted_iota(jnp.int32, split, 2 * dim + 1)
    tiles = jnp.where(chosen.reshape(blocks) == number, gradient.reshape(blocks), jnp.zeros((), gradient.dtype))
    whole = tiles.reshape([count * width for count, width in zip(gradient.shape, window)])
    widths = [(0, size - covered, 0) for size, covered in zip(shape, whole.shape)]
    return lax.pad(whole, jnp.zeros((), whole.dtype), widths)


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
        here = _strided(chosen, corner, shape, ones, first=0) == number
        part = jnp.where(here, _strided(gradient, corner, shape, ones, first=0), jnp.zeros((), gradient.dtype))
        total = part if total is None else total + part
    return total


def _choose_pool(equation: JaxprEqn) -> Callable | None:
    """A maximum or sum over windows that overlap, as one over shifted copies; of windows side by side XLA's own form is faster."""
    params, operand = equation.params, equation.invars[0].aval
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    join, start = _JOINS[equation.primitive.name]
    spared = tuple(window) == tuple(strides) or (join is jnp.add and math.prod(strides) == 1 and math.prod(window) <= 4)
    if dilated or spared or not 1 < math.prod(window) <= MOST_OFFSETS or not jnp.issubdtype(operand.dtype, jnp.floating):
        return None
    shape = equation.outvars[0].aval.shape

    def form(images):
        padded = lax.optimization_barrier(lax.pad(images, jnp.asarray(start, images.dtype), [(low, high, 0) for low, high in padding]))
        return functools.reduce(
            join, (_strided(padded, starts, shape, strides, first=0) for starts in itertools.product(*map(range, window)))
        )

    return form


_JOINS: dict[str, tuple[Callable, float]] = {"reduce_window_max": (jnp.maximum, -math.inf), "reduce_window_sum": (jnp.add, 0.0)}


# The largest few ----------------------------------------------------------------------------------------------------------------------


def _choose_top_k(equation: JaxprEqn) -> Callable | None:
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


# Random bits --------------------------------------------------------------------------------------------------------------------------


def _choose_random_bits(equation: JaxprEqn) -> Callable | None:
    key, shape, width = equation.invars[0].aval, equation.params["shape"], equation.params["bit_width"]
    ours = str(key.dtype) == "key<fry>" and key.shape == () and width == 32 and jax.config.jax_threefry_partitionable
    if not ours or not 0 < math.prod(shape) < 2**32:
        return None

    size = math.prod(shape)
    half = -(-size // 2)

    def form(key):
        places, words = lax.iota(jnp.uint32, half), jax.random.key_data(key)
        # A loop, because its result is kept: without, the backward pass computes the bits again.
        halves = lax.map(lambda start: functools.reduce(operator.xor, _threefry(words, start + places)), np.array([0, half], np.uint32))
        return halves.reshape(-1)[:size].reshape(shape)

    return form


def _threefry(key: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds of (0, counts), written out: JAX's own loop of five passes goes through memory ten times.

    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    schedule = key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)
    first, second = jnp.broadcast_to(schedule[0], counts.shape), counts + schedule[1]
    for turn in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            first = first + second
            second = first ^ ((second << np.uint32(distance)) | (second >> np.uint32(32 - distance)))
        first = first + schedule[(turn + 1) % 3]
        second = second + schedule[(turn + 2) % 3] + np.uint32(turn + 1)
    return first, second


_CHOOSERS: dict[str, Callable[[JaxprEqn], Callable | None]] = {
    "conv_general_dilated": _choose_convolution,
    "dot_general": _choose_dot,
    "random_bits": _choose_random_bits,
    "reduce_window_max": _choose_pool,
    "reduce_window_sum": _choose_pool,
    "select_and_scatter_add": _choose_pool_gradient,
    "top_k": _choose_top_k,
}
