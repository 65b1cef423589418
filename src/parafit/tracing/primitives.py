"""What JAX's primitives do, as far as a plan cares: their kind, how they tie dims, their FLOPs, whether they fuse.

JAX is not imported: all is read from the parameters of a traced equation.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parafit.tracing import dim_rules
from parafit.tracing.dim_rules import Rule, Shape


@dataclass(frozen=True, kw_only=True)
class Primitive:
    """How a primitive behaves.

    Attributes:
        kind: one of `parafit.planner.program.KINDS`.
        rule: ties its dims.
        flops: of one run, from (parameters, operand shapes, result shapes).
        fuses: its result need not be written to memory if those that read it can compute it on the way.
        alias: its result is its first operand seen otherwise: no memory is touched.
        costly: not worth computing twice.
        absorbs: chains of elementwise operations can run inside it.
    """

    kind: str
    rule: Rule
    flops: Callable[[dict, list[Shape], list[Shape]], float]
    fuses: bool = False
    alias: bool = False
    costly: bool = False
    absorbs: bool = False


def primitive_named(primitive: str) -> Primitive:
    """How a primitive behaves; one that is not known is of kind "unknown": its dims are fixed and tied to none.

    >>> primitive_named("dot_general").kind, primitive_named("made_up").kind
    ('matmul', 'unknown')
    """
    return _KNOWN.get(primitive, _UNKNOWN)


def matmul_shape(params: dict, shapes: Sequence[Shape]) -> Shape:
    """(batches, rows, inner, columns) of a `dot_general`.

    Args:
        params: of the traced equation.
        shapes: of its two operands.
    """
    (sums, _), (batches, others) = params["dimension_numbers"]
    inner, batch = math.prod(shapes[0][i] for i in sums), math.prod(shapes[0][i] for i in batches)
    other_batch = math.prod(shapes[1][i] for i in others)
    whole = max(1, batch * inner), max(1, other_batch * inner)
    return batch, math.prod(shapes[0]) // whole[0], inner, math.prod(shapes[1]) // whole[1]


# FLOPs --------------------------------------------------------------------------------------------------------------------------------


def _none(params, inputs, outputs) -> float:
    return 0.0


def _per_result(params, inputs, outputs) -> float:
    return float(sum(math.prod(shape) for shape in outputs[:1]))


def _per_operand(params, inputs, outputs) -> float:
    return float(math.prod(inputs[0]))


def _dot_flops(params, inputs, outputs) -> float:
    return 2.0 * math.prod(matmul_shape(params, inputs))


def _convolution_flops(params, inputs, outputs) -> float:
    """Two for each pair of an image's element and a kernel's element that meet; padding and the holes of dilation are not counted."""
    numbers = params["dimension_numbers"]
    (_, _, *places), (_, entering, *windows), (out_batch, out_feature, *outs) = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    images, kernel, result = inputs[0], inputs[1], outputs[0]
    lines = zip(places, windows, outs, params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"])
    meetings = (
        _meetings(images[place], kernel[window], result[out], stride, low, holes, spread)
        for place, window, out, stride, (low, _), holes, spread in lines
    )
    return 2.0 * result[out_batch] * result[out_feature] * kernel[entering] * math.prod(meetings)


@functools.lru_cache(4096)
def _meetings(size: int, window: int, outs: int, stride: int, low: int, holes: int, spread: int) -> int:
    """Along one dimension: how many pairs of an output and a window's element fall on an element of the image."""
    return sum(
        0 <= place < (size - 1) * holes + 1 and place % holes == 0
        for out in range(outs)
        for place in range(out * stride - low, out * stride - low + window * spread, spread)
    )


def _window_flops(params, inputs, outputs) -> float:
    return float(math.prod(outputs[0]) * math.prod(params["window_dimensions"]))


def _window_gradient_flops(params, inputs, outputs) -> float:
    """For each window its comparisons, and one addition."""
    return float(math.prod(inputs[0]) * (math.prod(params["window_dimensions"]) + 1))


def _sort_flops(params, inputs, outputs) -> float:
    """Comparisons of a merge sort: n log₂ n."""
    length = inputs[0][params["dimension"]]
    return math.prod(inputs[0]) * max(1.0, math.log2(max(1, length)))


def _random_flops(params, inputs, outputs) -> float:
    """Threefry-2x32: 20 rounds of addition, rotation (three) and exclusive or; 5 injections of the key, of three additions."""
    return 115.0 * math.prod(outputs[0])


def _update_flops(params, inputs, outputs) -> float:
    return float(math.prod(inputs[2]))


# The table ----------------------------------------------------------------------------------------------------------------------------

_UNKNOWN = Primitive(kind="unknown", rule=dim_rules.unknown, flops=_none)
_ARITHMETIC = Primitive(kind="elementwise", rule=dim_rules.elementwise, flops=_per_result, fuses=True)
_COSTLY = Primitive(kind="elementwise", rule=dim_rules.elementwise, flops=_per_result, fuses=True, costly=True)
_SELECTION = Primitive(kind="elementwise", rule=dim_rules.elementwise, flops=_none, fuses=True)
_ALIAS = Primitive(kind="move", rule=dim_rules.identity, flops=_none, fuses=True, alias=True)
_REDUCTION = Primitive(kind="reduction", rule=dim_rules.reduce, flops=_per_operand, absorbs=True)
_ODD_REDUCTION = Primitive(kind="reduction", rule=dim_rules.reduce_oddly, flops=_per_operand, absorbs=True)
_WINDOW = Primitive(kind="pooling", rule=dim_rules.window, flops=_window_flops)
_SCAN = Primitive(kind="reduction", rule=dim_rules.along("axis"), flops=_per_operand)
_KEY = Primitive(kind="random", rule=dim_rules.free, flops=_none)
_SCATTER = Primitive(kind="scatter", rule=dim_rules.scatter(sums=True), flops=_update_flops)
_SCATTER_OVER = Primitive(kind="scatter", rule=dim_rules.scatter(sums=False), flops=_none)


def _moves(rule: Rule, **options) -> Primitive:
    return Primitive(kind="move", rule=rule, flops=_none, fuses=True, **options)


def _all(names: str, one: Primitive) -> dict[str, Primitive]:
    return dict.fromkeys(names.split(), one)


_KNOWN: dict[str, Primitive] = {
    **_all(
        "abs add add_any and ceil clz eq eq_to floor ge gt integer_pow is_finite le le_to lt lt_to max min mul mulhi mul_hi", _ARITHMETIC
    ),
    **_all("ne neg nextafter not or population_count round shift_left shift_right_arithmetic shift_right_logical sign", _ARITHMETIC),
    **_all("one_minus_square square sub xor", _ARITHMETIC),
    **_all("acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma div erf erf_inv erfc exp exp2", _COSTLY),
    **_all("expm1 igamma igammac igamma_grad_a lgamma log log1p log2 logistic polygamma pow random_gamma_grad", _COSTLY),
    **_all("regularized_incomplete_beta rem rsqrt sin sinh sqrt tan tanh zeta", _COSTLY),
    **_all("clamp complex conj convert_element_type imag real reduce_precision select_n threefry2x32", _SELECTION),
    **_all("copy copy_p device_put name optimization_barrier pvary reshard sharding_constraint stop_gradient", _ALIAS),
    "bitcast_convert_type": Primitive(kind="move", rule=dim_rules.elementwise, flops=_none, fuses=True, alias=True),
    **_all("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor argmax argmin", _REDUCTION),
    "reduce": _ODD_REDUCTION,
    **_all("reduce_window reduce_window_max reduce_window_min reduce_window_sum", _WINDOW),
    "select_and_gather_add": _WINDOW,
    "select_and_scatter_add": Primitive(kind="pooling", rule=dim_rules.window_gradient, flops=_window_gradient_flops),
    **_all("cumsum cumprod cummax cummin cumlogsumexp", _SCAN),
    "sort": Primitive(kind="sort", rule=dim_rules.along("dimension"), flops=_sort_flops),
    "top_k": Primitive(kind="sort", rule=dim_rules.top, flops=_per_operand),
    "dot_general": Primitive(kind="matmul", rule=dim_rules.dot, flops=_dot_flops),
    "conv_general_dilated": Primitive(kind="convolution", rule=dim_rules.convolution, flops=_convolution_flops),
    "gather": Primitive(kind="gather", rule=dim_rules.gather, flops=_none),
    **_all("scatter-add scatter_add scatter-sub", _SCATTER),
    **_all("scatter scatter-mul scatter-min scatter-max scatter_mul scatter_min scatter_max", _SCATTER_OVER),
    "broadcast_in_dim": _moves(dim_rules.broadcast),
    "transpose": _moves(dim_rules.transpose, alias=True),
    **_all("reshape squeeze expand_dims", _moves(dim_rules.reshape, alias=True)),
    "rev": _moves(dim_rules.reverse),
    "concatenate": _moves(dim_rules.concatenate),
    "stack": Primitive(kind="move", rule=dim_rules.stack, flops=_none),  # written down: XLA:CPU computes nothing inside it
    "unstack": _moves(dim_rules.unstack),
    "pad": _moves(dim_rules.pad),
    **_all("slice split dynamic_slice tile", _moves(dim_rules.crop)),
    "dynamic_update_slice": Primitive(kind="move", rule=dim_rules.update, flops=_none),
    "iota": _moves(dim_rules.free),
    "empty": _moves(dim_rules.free),
    **_all("random_bits rng_bit_generator rng_uniform random_gamma", Primitive(kind="random", rule=dim_rules.free, flops=_random_flops)),
    **_all("random_wrap random_unwrap random_seed random_split random_fold_in random_clone", _KEY),
}
